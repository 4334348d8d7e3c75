"""A kernel in place of the expression that it stands for: the kernel's values, and everything else of the expression.

To JAX a kernel is opaque: it has no derivative, and it can be batched along the axes only that it was made for. So its tangents are those of the
expression, at any order, and under `jax.vmap` it is the expression that is batched, unless the kernel has a rule for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

BatchingRule = Callable[..., tuple[Any, Any]]


def stand_in(kernel: Callable[..., Any], expression: Callable[..., Any], arrays: Sequence[Any], batched: BatchingRule | None = None) -> Any:
    """`kernel(*arrays)`, differentiated and batched as `expression(*arrays)`.

    Args:
        kernel: computes what `expression` does, up to rounding; both return the same structure of arrays of the same shapes and dtypes.
        expression: is made of operations that JAX can differentiate.
        arrays: pytrees of arrays.
        batched: `(size, in_batched, *arrays) -> (outputs, out_batched)`, the kernel's rule under `jax.vmap`; batches are on axis 0.
    """
    mapped = jax.custom_batching.custom_vmap(lambda *arrays: kernel(*arrays))
    mapped.def_vmap(batched or _batched_expression(expression))
    whole = jax.custom_jvp(lambda *arrays: mapped(*arrays))
    whole.defjvp(lambda primals, tangents: (whole(*primals), jax.jvp(expression, primals, tangents)[1]))
    return whole(*arrays)


def merging_batches(kernel: Callable[..., Any], expression: Callable[..., Any]) -> BatchingRule:
    """A rule for `stand_in` of a kernel whose arguments and results all have a batch on axis 0: one call for the batch of batches."""

    def batched(size: int, in_batched: Any, *arrays: Any) -> tuple[Any, Any]:
        def merge(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jax.numpy.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        merged = jax.tree.map(merge, arrays, tuple(in_batched))
        outputs = stand_in(kernel, expression, merged, batched)
        outputs = jax.tree.map(lambda y: y.reshape(size, y.shape[0] // size, *y.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return batched


def _batched_expression(expression: Callable[..., Any]) -> BatchingRule:
    def batched(size: int, in_batched: Any, *arrays: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
        outputs = jax.vmap(expression, in_axes=axes, axis_size=size)(*arrays)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return batched
