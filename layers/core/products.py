"""Products of matrices that call `lax.dot_general` themselves.

`jnp.einsum`, `jnp.matmul`, `@` and their like are jitted: JAX keeps what they were traced to. Quantisation libraries replace `jax.lax.dot_general`
while they trace a model, and a rule that went through one of those functions would leave the replaced product there, for all later programs.
They mean the products of a model's own layers, and add parameters to them, which would have no gradient in a rule of another layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_PRODUCT, _CODE = lax.dot_general, lax.dot_general.__code__


def products_are_patched() -> bool:
    """Whether `jax.lax.dot_general` is not JAX's now, by its name or by its code: a twin leaves its products to Flax's code then."""
    return lax.dot_general is not _PRODUCT or lax.dot_general.__code__ is not _CODE


def jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit`, which stands aside while products are patched: it would keep those, or have kept the others."""
    compiled = jax.jit(fn, **options)
    return functools.wraps(fn)(lambda *args, **kwargs: (fn if products_are_patched() else compiled)(*args, **kwargs))


def einsum(spec: str, x: jax.Array, y: jax.Array, **options: Any) -> jax.Array:
    """The product of two arrays as `jnp.einsum` writes it, of operands of one dtype.

    Args:
        spec: every letter names an axis: in both operands and the result, of a batch; in both operands only, one that is added up; in one operand
            and the result, one of its own. Axes that are written "..." are the first operand's own.
        x, y: the operands.
        **options: those of `jax.lax.dot_general`; an `out_sharding` is that of a result whose axes stand in the order batch, `x`, `y`.
    """
    return _einsum(spec, x, y, options, swap=True)


def _einsum(spec: str, x: jax.Array, y: jax.Array, options: dict[str, Any], *, swap: bool) -> jax.Array:
    operands, out = spec.split("->")
    a, b = operands.split(",")
    more = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: x.ndim - len(a.replace("...", ""))]
    a, out = a.replace("...", more), out.replace("...", more)
    batch = "".join(c for c in out if c in a and c in b)
    own_a, own_b = ("".join(c for c in s if c in out and c not in batch) for s in (a, b))
    if (
        swap and batch + own_a + own_b != out
    ):  # as `jnp.einsum` does: also where neither order gives the result's, XLA's CPU compiler copies less then
        return _einsum(f"{b},{a}->{out}", y, x, options, swap=False)
    summed = [c for c in a if c in b and c not in out]
    assert len(batch) + len(summed) + len(own_a) == len(a), f"{spec}: an axis of the first operand is nowhere else"
    dimensions = (([a.index(c) for c in summed], [b.index(c) for c in summed]), ([a.index(c) for c in batch], [b.index(c) for c in batch]))
    made = batch + own_a + own_b
    product = lax.dot_general(x, y, dimensions, **options)
    return product if made == out else lax.transpose(product, [made.index(c) for c in out])


def matmul(x: jax.Array, y: jax.Array, **options: Any) -> jax.Array:
    """`x @ y` for a `y` of two axes."""
    return einsum("...i,io->...o", x, y, **options)


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum of x y over all entries of two arrays of one shape, of their common dtype."""
    axes, dtype = list(range(x.ndim)), jnp.promote_types(x.dtype, y.dtype)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), ((axes, axes), ([], [])))
