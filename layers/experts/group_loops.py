"""Loops over the blocks of rows of one group after the other: no row of another group is multiplied.

Rows lie group by group, so a block is a slice. The last block of a group reaches into the next one's rows: these are left out by their place,
whatever they hold. Each group costs its rows, rounded up to whole blocks; a group without rows costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat
from layers.core.numerics import wide
from layers.core.slices import slice_here


def map_groups(x: jax.Array, kernels: jax.Array, sizes: jax.Array, block: int, *, transposed: bool, dtype: Any) -> jax.Array:
    """x_i W_g for each row i of each group g, or x_i W_gᵀ; 0 for rows after the last group.

    Args:
        x: (rows, in).
        kernels: (groups, in, out), `transposed` (groups, out, in).
        sizes: (groups,), rows of each group.
        block: rows of a block.
        transposed: which.
        dtype: of the result.
    """
    features, contracted = kernels.shape[1 if transposed else 2], 1 if transposed else 0

    def one_group(y: jax.Array, g: Any, start: Any, end: Any) -> jax.Array:
        kernel = slice_here(kernels, g, 1, 0)[0]

        def one_block(y: jax.Array, at: Any, inside: jax.Array) -> jax.Array:
            rows = slice_here(x, at, block, 0)
            new = lax.dot_general(rows, kernel, (((1,), (contracted,)), ((), ())), preferred_element_type=wide(dtype)).astype(dtype)
            old = lax.dynamic_slice_in_dim(y, at, block, 0)
            return lax.dynamic_update_slice_in_dim(y, jnp.where(inside, new, old), at, 0)

        return _over_blocks(one_block, y, start, end, x.shape[0], block, (x, kernel))

    return _over_groups(one_group, jnp.zeros((x.shape[0], features), dtype), sizes, x.shape[0], (x, kernels))


def sum_groups(x: jax.Array, y: jax.Array, sizes: jax.Array, block: int, dtype: Any) -> jax.Array:
    """Σ x_iᵀ y_i over the rows i of each group, (groups, in, out), added up in float32 or wider."""

    def one_group(sums: jax.Array, g: Any, start: Any, end: Any) -> jax.Array:
        def one_block(total: jax.Array, at: Any, inside: jax.Array) -> jax.Array:
            a, b = (jnp.where(inside, slice_here(v, at, block, 0), 0) for v in (x, y))
            return total + lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)

        total = _over_blocks(one_block, jnp.zeros((x.shape[1], y.shape[1]), wide(dtype)), start, end, x.shape[0], block, (x, y))
        return lax.dynamic_update_index_in_dim(sums, total.astype(dtype), g, 0)

    return _over_groups(one_group, jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), dtype), sizes, x.shape[0], (x, y))


def _over_groups(fn: Callable[..., jax.Array], carry: jax.Array, sizes: jax.Array, rows: int, beside: Any) -> jax.Array:
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(sizes, 0)), rows)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])

    def body(carry: jax.Array, group: Any) -> tuple[jax.Array, None]:
        return fn(carry, *group), None

    groups = (jnp.arange(sizes.shape[0], dtype=ends.dtype), starts, ends)
    carry = compat.vary_like(carry, lambda c: body(c, jax.tree.map(lambda a: a[0], groups))[0], beside, sizes)
    return lax.scan(body, carry, groups)[0]


def _over_blocks(fn: Callable[..., jax.Array], carry: jax.Array, start: Any, end: Any, rows: int, block: int, beside: Any) -> jax.Array:
    """`fn(carry, at, inside)` for the blocks of [start, end): `inside` says which rows of [at, at + block) are new and of the group; `beside` are the
    arrays that it uses."""

    def body(state: Any) -> Any:
        carry, first = state
        at = jnp.minimum(first, rows - block)
        places = at + jnp.arange(block, dtype=at.dtype)
        return fn(carry, at, ((places >= first) & (places < end))[:, None]), first + block

    state = compat.vary_like((carry, start), body, end, beside)
    return lax.while_loop(lambda s: s[1] < end, body, state)[0]
