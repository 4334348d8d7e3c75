"""One tile of the score matrix of attention: the scores of a block of queries against a block of keys, for all heads at once.

In the last block of a length that the block does not divide, rows that the block before it had too are hidden, so no array is ever padded.

A hidden key has the weight 0, and what is hidden is not touched. Where sums of products run over keys, as in Σ p v, 0 times NaN would not be 0: there
values that are not finite are taken as 0, and make NaN the scores of the queries that see them (of values, of their tangents, of gradients that
arrive, of keys and queries).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layers.attention.heads import group_heads, split_heads
from layers.attention.plan import Hidden, Options
from layers.core.hashing import ODD, mix, spared
from layers.core.numerics import dot, wide
from layers.core.slices import slice_here


@dataclass(frozen=True)
class Layout:
    """What all tiles of one call of attention have in common.

    Attributes:
        lengths, blocks: of the queries and of the keys.
        planes: batch, kv heads, query heads to a kv head.
        hidden, options: what is left out.
    """

    lengths: tuple[int, int]
    blocks: tuple[int, int]
    planes: tuple[int, int, int]
    hidden: Hidden
    options: Options

    @property
    def kv_heads(self) -> int:
        return self.planes[1]

    @property
    def hides(self) -> bool:
        """Whether a key may be hidden from a query."""
        return self.options.bounded or any(x is not None for x in self.hidden[:5])


class Tile:
    """One tile: takes its part of arrays, adds to it, and computes its scores.

    A `side` of the score matrix, an int, is 0 for its rows, the queries, and 1 for its columns, the keys.

    Args:
        grid: what all tiles have in common.
        index: which tile: int32 (2,), the number of its block of queries and of its block of keys.
        first, last: boolean scalars: whether it is the first and the last one of its row of tiles (or column, where the loop goes along columns), so
            that a sum over that row starts with it and is written after it.
    """

    def __init__(self, grid: Layout, index: Any, first: Any = True, last: Any = True):
        self.grid, self.index, self.first, self.last = grid, index, first, last
        self.start = [jnp.minimum(index[i] * grid.blocks[i], grid.lengths[i] - grid.blocks[i]) for i in (0, 1)]

    def position(self, side: int) -> jax.Array:
        return self.start[side] + jnp.arange(self.grid.blocks[side], dtype=jnp.int32)

    def take(self, x: jax.Array, side: int, axis: int = 1) -> jax.Array:
        """The rows of `x` in this tile's block of queries (side 0) or keys (side 1); all of it where that axis is shared."""
        if x.shape[axis] == 1:
            return x
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
        return (slice_here if narrow else lax.dynamic_slice_in_dim)(x, self.start[side], self.grid.blocks[side], axis)

    def add_up(self, x: jax.Array, total: jax.Array | None, part: jax.Array, side: int) -> tuple[jax.Array, jax.Array | None]:
        """Adds to `x` by way of `total`, the sum of the parts of one block of the outer side, this one; None to add to `x` itself.

        The last tile of the block writes it: XLA's CPU compiler goes through all of a 16-bit `x` to write a part of it.
        """
        if total is None:
            return self.add(x, part, side), None
        total = jnp.where(self.first, 0, total) + part

        def write(x: jax.Array, whole: jax.Array) -> jax.Array:
            if self.grid.lengths[side] % self.grid.blocks[side]:
                own = self.position(side) >= self.index[side] * self.grid.blocks[side]
                whole = jnp.where(own.reshape(-1, *[1] * (x.ndim - 2)), whole, self.take(x, side))
            return self.put(x, whole, side)

        return lax.cond(self.last, write, lambda x, _: x, x, total.astype(x.dtype)), total

    def put(self, x: jax.Array, part: jax.Array, side: int) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), self.start[side], 1)

    def add(self, x: jax.Array, part: jax.Array, side: int) -> jax.Array:
        return self.put(x, self.take(x, side) + part, side)

    def queries(self, x: jax.Array) -> jax.Array:
        """(batch, time, heads, ...) in this tile as (batch, kv heads, group, rows, ...)."""
        return group_heads(self.take(x, 0), self.grid.kv_heads)

    def keys(self, x: jax.Array) -> jax.Array:
        return self.take(x, 1)

    def plane(self, x: jax.Array) -> jax.Array:
        """A bias or mask (batch, heads, time, time), any of them 1, in this tile as (batch, kv heads, group, rows, columns)."""
        x = self.take(self.take(x, 0, 2), 1, 3)
        return x.reshape(x.shape[0], *split_heads(x.shape[1], self.grid.kv_heads), *x.shape[2:])

    def add_to_plane(self, x: jax.Array, part: jax.Array) -> jax.Array:
        """Adds to `x`, which is like a bias, what this tile has for it, summed over the axes that it shares."""
        kv, group = split_heads(x.shape[1], self.grid.kv_heads)
        shared = (x.shape[0], kv, group, *(1 if n == 1 else m for n, m in zip(x.shape[2:], part.shape[3:], strict=True)))
        axes = tuple(i for i, (n, m) in enumerate(zip(shared, part.shape, strict=True)) if n == 1 and m != 1)
        part = part.sum(axes, keepdims=True).reshape(x.shape[:2] + shared[3:])
        start = (0, 0, *(0 if n == 1 else s for n, s in zip(x.shape[2:], self.start, strict=True)))
        start = tuple(jnp.asarray(s, jnp.int32) for s in start)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, part.shape) + part, start)

    def visible(self) -> jax.Array | None:
        """True where a score counts, broadcastable to (batch, kv heads, group, rows, columns); None for everywhere."""
        grid, hidden, (rows, columns) = self.grid, self.grid.hidden, (self.position(0)[:, None], self.position(1))
        options, found = grid.options, []
        if grid.lengths[0] % grid.blocks[0]:
            found.append(rows >= self.index[0] * grid.blocks[0])
        if grid.lengths[1] % grid.blocks[1]:
            found.append(columns >= self.index[1] * grid.blocks[1])
        steps = rows - columns if hidden.offsets is None else rows + _of_batch(hidden.offsets) - columns
        if options.low is not None:
            found.append(steps >= options.low)
        if options.high is not None:
            found.append(steps <= options.high)
        if hidden.query_lengths is not None:
            found.append(rows < _of_batch(hidden.query_lengths))
        if hidden.key_lengths is not None:
            found.append(columns < _of_batch(hidden.key_lengths))
        if hidden.query_segments is not None:
            of_rows, of_columns = self.take(hidden.query_segments, 0), self.take(hidden.key_segments, 1)
            found.append(of_rows[:, None, None, :, None] == of_columns[:, None, None, None, :])
        if hidden.mask is not None:
            found.append(self.plane(hidden.mask))
        return _all(found)

    def product(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Scaled products of queries and keys."""
        return dot("bkgqh,bskh->bkgqs", q, k) * self.grid.options.scale

    def scores(self, q: jax.Array, k: jax.Array, bias: jax.Array | None, spoiled: jax.Array | float = 0.0) -> tuple[jax.Array, jax.Array | float]:
        """The scores, -inf where hidden, and their derivative by the scaled products; `spoiled` is added to what is seen."""
        s, slope, cap, visible = self.product(q, k), 1.0, self.grid.options.cap, self.visible()
        if cap is not None:
            t = jnp.tanh(s / cap)
            s, slope = cap * t, 1 - t * t
            slope = slope if visible is None else jnp.where(visible, slope, 0)
        if bias is not None:
            s = s + self.plane(bias).astype(s.dtype)
        s = jnp.minimum(s, jnp.finfo(s.dtype).max / 2)
        s = s + spoiled if self.grid.hides else s
        return (s if visible is None else jnp.where(visible, s, -jnp.inf)), slope

    def seen(self, p: jax.Array, x: jax.Array) -> jax.Array:
        """`x`, and 0 where the weight is 0: what a hidden key or query would make NaN."""
        return jnp.where(p == 0, 0, x) if self.grid.hides else x

    def bounded(self, x: jax.Array) -> jax.Array:
        """What is multiplied by a weight of 0 where hidden: large numbers of hidden keys may overflow in it."""
        return jnp.clip(x, -jnp.finfo(x.dtype).max, jnp.finfo(x.dtype).max) if self.grid.hides else x

    def finite(self, x: jax.Array) -> jax.Array:
        """What is summed up over keys or queries of which some are hidden: without what times 0 is not 0."""
        return jnp.where(jnp.isfinite(x), x, 0) if self.grid.hides else x

    def finite_queries(self, x: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """`finite` of `queries`, and what to add to the scores of those from which it takes something: NaN."""
        x = self.queries(x)
        return self.finite(x), self._spoiled(x)[..., None] if self.grid.hides else 0.0

    def finite_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """The same of `keys`."""
        x = self.keys(x)
        return self.finite(x), jnp.moveaxis(self._spoiled(x), 1, 2)[:, :, None, None] if self.grid.hides else 0.0

    def _spoiled(self, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(x).all(-1), 0, jnp.nan).astype(wide(x.dtype))

    def multiplier(self, dtype: Any) -> jax.Array | None:
        """What dropout multiplies the weights by, 0 or 1 / (1 - rate): as given, or a hash of batch element, head and positions."""
        hidden, rate = self.grid.hidden, self.grid.options.rate if self.grid.hidden.rate is None else self.grid.hidden.rate
        if not hidden.drops:
            return None
        kept = self._spared(hidden.words, rate) if hidden.spared is None else self.plane(hidden.spared)
        return kept.astype(dtype) / jnp.asarray(1 - rate, dtype)

    def _spared(self, words: jax.Array, rate: Any) -> jax.Array:
        grid = self.grid
        first, second = words[0], words[-1]
        planes = (1, 1, 1) if grid.options.shared_dropout else grid.planes
        plane = jnp.arange(np.prod(planes), dtype=jnp.uint32).reshape(*planes, 1, 1)
        of_rows = mix(mix(plane ^ first) + self.position(0)[:, None].astype(jnp.uint32))
        of_columns = mix(self.position(1).astype(jnp.uint32) ^ mix(second + jnp.uint32(ODD)))
        return spared(mix(of_rows ^ of_columns), rate)


def _all(found: list[jax.Array]) -> jax.Array | None:
    visible = None
    for one in found:
        visible = one if visible is None else visible & one
    return visible


def _of_batch(x: jax.Array) -> jax.Array:
    return x[:, None, None, None, None]
