"""Loops over time and over chunks of time that are right under `shard_map`, and for arrays along explicit axes of a mesh, as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat
from layers.core.sharding import explicit_sharding

Step = Callable[..., tuple[Any, Any]]


def scan(step: Step, carry: Any, xs: Any, *, reverse: bool = False, beside: Any = ()) -> tuple[Any, Any]:
    """`jax.lax.scan`, where the carry may come to differ between devices that share where it starts (`shard_map`), or to lie on several.

    Args:
        step: as in `jax.lax.scan`.
        carry: where it starts.
        xs: arrays with the steps along axis 0.
        reverse: from the last step to the first.
        beside: the other arrays that `step` uses.
    """
    arrays = jax.tree.leaves((xs, carry, beside))
    if arrays[0].shape[0]:
        carry = compat.vary_like(carry, lambda c: step(c, jax.tree.map(lambda x: x[0], xs))[0], xs, beside)
    if arrays[0].shape[0] and any(explicit_sharding(x) is not None for x in arrays):
        carry = _placed(carry, lambda c, xs: step(c, jax.tree.map(lambda x: x[0], xs))[0], xs)
    return lax.scan(step, carry, xs, reverse=reverse)


def _placed(carry: Any, step: Callable[[Any, Any], Any], xs: Any) -> Any:
    """`carry` along every explicit axis of a mesh along which `step(carry, xs)` lies."""
    leaves, tree = jax.tree.flatten(carry)
    while True:
        after = jax.make_jaxpr(lambda leaves, xs: jax.tree.leaves(step(tree.unflatten(leaves), xs)))(leaves, xs).out_avals
        wider = [a.sharding if _axes(a) - _axes(jax.typeof(x)) else None for a, x in zip(after, leaves, strict=True)]
        if not any(wider):
            return tree.unflatten(leaves)
        leaves = [x if place is None else jax.sharding.reshard(x, place) for x, place in zip(leaves, wider, strict=True)]


def _axes(aval: Any) -> set[str]:
    """The mesh axes that an array lies along."""
    return {name for entry in aval.sharding.spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))}


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
        starts = chunk * jnp.arange(full)
        carry, keep_full = scan(body, carry, (starts, kept_full), reverse=reverse, beside=beside)
    if rest and not reverse:
        carry, keep_rest = step(carry, full * chunk, rest, kept_rest)
    return carry, (keep_full, keep_rest)


def without_first(kept: Any) -> Any:
    """What a fold kept of states before chunks, without the first one's, which is alive anyway, where that saves memory.

    Those of several full chunks are one array: it would be there twice while the first state is put back.
    """
    full, rest = kept
    if full is None:
        return None, None
    return (None, rest) if full.shape[0] == 1 else kept


def with_first(kept: Any, first: jax.Array, length: int, chunk: int) -> Any:
    """What `without_first` was given, for `length` steps in chunks of `chunk`."""
    full = length // chunk
    if full > 1:
        return kept
    return (first[None], kept[1]) if full else (None, first)


def cut(x: jax.Array, start: Any, size: int, dtype: Any) -> jax.Array:
    """A chunk of `x`, (batch, time, ...), as (time, batch, ...) in `dtype`."""
    return jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, size, 1), 1, 0).astype(dtype)


def put(into: jax.Array, x: jax.Array, start: Any) -> jax.Array:
    """`into`, (batch, time, ...), with a chunk (time, batch, ...) put in."""
    return lax.dynamic_update_slice_in_dim(into, jnp.moveaxis(x, 0, 1).astype(into.dtype), start, 1)
