"""Loops of a backward whose memory XLA allocates no earlier than they run.

What a loop starts from depends on nothing, so XLA's scheduler on the CPU writes the zeros of the backward loops of all layers first, and a
stack of n layers holds n of each at once. Made of an element of what the loop reads, they are allocated when its turn comes; and the output of a
loop over blocks of rows is written in place into what is carried along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from layers.core import compat
from layers.core.blocks import count_rows, scan_blocks
from layers.core.recompute import is_transposing
from layers.core.sharding import on_one_device


def zero_after(x: jax.Array) -> Any:
    """A floating-point zero that XLA cannot tell from an element of `x`; a plain one where `x` is empty or may lie on several devices."""
    if x.size == 0 or not on_one_device(x):
        return 0.0
    first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    return jnp.where(first > 0, -0.0, 0.0)


def scan_blocks_deferred(body: Callable[..., tuple[Any, Any]], sums: Any, arrays: Any, *, block: int) -> tuple[Any, Any]:
    """`scan_blocks` that takes no memory before the first of `arrays` is there: the incoming gradient, of a floating-point dtype.

    The same loop as any other where the rows may lie on several devices, and in a rule that is transposed, which must be linear throughout.
    """
    length, first = count_rows(arrays), jax.tree.leaves(arrays)[0]
    if is_symbolic_dim(length) or length < 2 * block or first.size == 0 or is_transposing() or not on_one_device(*jax.tree.leaves(arrays)):
        return scan_blocks(body, sums, arrays, block=block)
    end = length - length % block

    def step(state: tuple[Any, Any], given: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
        (sums, outs), (start, rows) = state, given
        sums, more = body(sums, rows)
        return (sums, jax.tree.map(lambda y, out: lax.dynamic_update_slice_in_dim(y, out, start, 0), outs, more)), None

    def rows(start: int, stop: int) -> Any:
        return jax.tree.map(lambda x: x[start:stop], arrays)

    outs = jax.tree.map(lambda y: jax.ShapeDtypeStruct((length, *y.shape[1:]), y.dtype), jax.eval_shape(body, sums, rows(0, block))[1])
    zero = zero_after(first)
    state = jax.tree.map(lambda s: jnp.full(s.shape, zero, s.dtype), (sums, outs))
    state = compat.vary_like(state, lambda s: step(s, (0, rows(0, block)))[0], arrays)
    grouped = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), rows(0, end))
    state, _ = lax.scan(step, state, (jnp.arange(0, end, block), grouped))
    return state if end == length else step(state, (end, rows(end, length)))[0]
