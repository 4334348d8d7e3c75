"""Loops over time and over chunks of time that are right under `shard_map` as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat

Step = Callable[..., tuple[Any, Any]]


def scan(step: Step, carry: Any, xs: Any, *, reverse: bool = False, beside: Any = ()) -> tuple[Any, Any]:
    """`jax.lax.scan`, where the carry may come to differ between devices (`shard_map`) that share where it starts.

    Args:
        step: as in `jax.lax.scan`.
        carry: where it starts.
        xs: arrays with the steps along axis 0.
        reverse: from the last step to the first.
        beside: the other arrays that `step` uses.
    """
    shapes = [jax.typeof(x) for x in jax.tree.leaves(xs)]
    if shapes[0].shape[0] and any(compat.varying_axes(jax.typeof(x)) for x in jax.tree.leaves((carry, xs, beside))):
        first = jax.tree.map(lambda x: x[0], xs)
        carry = compat.vary_like(carry, lambda c: step(c, first)[0])
    return lax.scan(step, carry, xs, reverse=reverse)


def fold_chunks(step: Step, carry: Any, length: int, chunk: int, kept: Any = None, *, reverse: bool = False, beside: Any = ()) -> tuple[Any, Any]:
    """Folds `step` over chunks of `chunk` time steps and a shorter last one.

    Args:
        step: `(carry, start, size, kept) -> (carry, keep)`; `start` is where the chunk starts, its `size` is a Python integer.
        carry: where it starts.
        length: the time steps in all.
        chunk: the time steps in a chunk.
        kept: what an earlier fold kept, given to the same chunks again.
        reverse: from the last chunk to the first.
        beside: the arrays that `step` uses.

    Returns:
        The last carry, and what `step` keeps: of all full chunks together, and of the last one.
    """
    full, rest = divmod(length, chunk)
    kept_full, kept_rest = (None, None) if kept is None else kept

    def body(carry: Any, x: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        return step(carry, x[0], chunk, x[1])

    keep_full = keep_rest = None
    if rest and reverse:
        carry, keep_rest = step(carry, full * chunk, rest, kept_rest)
    if full:
        starts = jnp.arange(0, full * chunk, chunk)
        carry, keep_full = scan(body, carry, (starts, kept_full), reverse=reverse, beside=beside)
    if rest and not reverse:
        carry, keep_rest = step(carry, full * chunk, rest, kept_rest)
    return carry, (keep_full, keep_rest)


def cut(x: jax.Array, start: Any, size: int, dtype: Any) -> jax.Array:
    """A chunk of `x`, (batch, time, ...), as (time, batch, ...) in `dtype`."""
    return jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, size, 1), 1, 0).astype(dtype)


def put(into: jax.Array, x: jax.Array, start: Any) -> jax.Array:
    """`into`, (batch, time, ...), with a chunk (time, batch, ...) put in."""
    return lax.dynamic_update_slice_in_dim(into, jnp.moveaxis(x, 0, 1).astype(into.dtype), start, 1)
