"""The score matrix of attention in tiles: what the scores of one are, and loops over all.

A tile is the scores of a block of queries against a block of keys, for all heads at once; `plan.py` has their sizes and their list. In the last
block of a length that the block does not divide, rows that the block before it had too are hidden, so no array is ever padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layers.attention import plan
from layers.attention.heads import group_heads, split_heads
from layers.attention.plan import Hidden, Options
from layers.core import compat
from layers.core.hashing import ODD, below, mix
from layers.core.numerics import dot, wide
from layers.core.slices import slice_here
from layers.core.zeros import lie_like


class Tile:
    """One tile: takes its part of arrays, adds to it, and computes its scores; `first` and `last` where it is that in its outer block."""

    def __init__(self, grid: Grid, index: Any, first: Any = True, last: Any = True):
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
        if options.low is not None:
            found.append(rows - columns >= options.low)
        if options.high is not None:
            found.append(rows - columns <= options.high)
        if hidden.query_lengths is not None:
            found.append(rows < hidden.query_lengths[:, None, None, None, None])
        if hidden.key_lengths is not None:
            found.append(columns < hidden.key_lengths[:, None, None, None, None])
        if hidden.query_segments is not None:
            of_rows, of_columns = self.take(hidden.query_segments, 0), self.take(hidden.key_segments, 1)
            found.append(of_rows[:, None, None, :, None] == of_columns[:, None, None, None, :])
        if hidden.mask is not None:
            found.append(self.plane(hidden.mask))
        return _all(found)

    def product(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Scaled products of queries and keys."""
        return dot("bkgqh,bskh->bkgqs", q, k) * self.grid.options.scale

    def scores(self, q: jax.Array, k: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | float]:
        """The scores, -inf where hidden, and their derivative by the scaled products."""
        s, slope, cap = self.product(q, k), 1.0, self.grid.options.cap
        if cap is not None:
            t = jnp.tanh(s / cap)
            s, slope = cap * t, 1 - t * t
        if bias is not None:
            s = s + self.plane(bias).astype(s.dtype)
        s = jnp.minimum(s, jnp.finfo(s.dtype).max / 2)
        visible = self.visible()
        return (s if visible is None else jnp.where(visible, s, -jnp.inf)), slope

    def multiplier(self, dtype: Any) -> jax.Array | None:
        """What dropout multiplies the weights by, 0 or 1 / (1 - rate): a hash of batch element, head and positions."""
        grid, rate = self.grid, self.grid.options.rate
        if not rate:
            return None
        first, second = grid.hidden.words[0], grid.hidden.words[-1]
        planes = (1, 1, 1) if grid.options.shared_dropout else grid.planes
        plane = jnp.arange(np.prod(planes), dtype=jnp.uint32).reshape(*planes, 1, 1)
        of_rows = mix(mix(plane ^ first) + self.position(0)[:, None].astype(jnp.uint32))
        of_columns = mix(self.position(1).astype(jnp.uint32) ^ mix(second + jnp.uint32(ODD)))
        kept = below(mix(of_rows ^ of_columns), 1 - rate)
        return kept.astype(dtype) / (1 - rate)


@dataclass(frozen=True)
class Grid:
    """All tiles of one call of attention.

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

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, hidden: Hidden, options: Options) -> Grid:
        lengths = q.shape[1], k.shape[1]
        blocks = options.blocks or plan.choose_blocks(*lengths, q.shape[3], wide(q.dtype) != q.dtype)
        return cls(lengths, blocks, (q.shape[0], *split_heads(q.shape[2], k.shape[2])), hidden, options)

    @property
    def kv_heads(self) -> int:
        return self.planes[1]

    def start_total(self, x: jax.Array, dtype: Any, zero: Any, side: int) -> jax.Array | None:
        """What `Tile.add_up` adds up in: one block of `x`, in a wider dtype; None where `x` has that dtype."""
        return None if x.dtype == dtype else lie_like(jnp.full((x.shape[0], self.blocks[side], *x.shape[2:]), zero, dtype), x)

    def fold(self, body: Callable[[Any, Tile], Any], carry: Any, *, outer: int = 0) -> Any:
        """`body(carry, tile)` over all tiles, those of a block of the outer side one after the other.

        Differentiated once more, it computes each tile's scores again.
        """
        tiles = plan.list_tiles(self.lengths, self.blocks, self.options.low, self.options.high)
        tiles = tiles[np.argsort(tiles[:, outer], kind="stable")]
        ends = np.diff(tiles[:, outer], prepend=-1, append=-1) != 0
        return self._fold(body, carry, (tiles, ends[:-1], ends[1:]))

    def fold_queries(self, body: Callable[[Any, Tile], Any], carry: Any) -> Any:
        """`body(carry, tile)` over all blocks of queries, whatever keys they see."""
        count = -(-self.lengths[0] // self.blocks[0])
        return self._fold(body, carry, (np.arange(count, dtype=np.int32)[:, None] * np.array([1, 0], np.int32), *[np.ones(count, bool)] * 2))

    def _fold(self, body: Callable[[Any, Tile], Any], carry: Any, tiles: tuple[np.ndarray, ...]) -> Any:
        """`tiles`: their indices, and whether each is the first and the last of its outer block."""
        if not len(tiles[0]):
            return carry
        one = tuple(x[0] for x in tiles)
        step = jax.checkpoint(lambda carry, which: body(carry, Tile(self, *which)), prevent_cse=False)
        carry = compat.vary_like(carry, lambda c: step(c, one), jax.eval_shape(step, carry, one))
        return lax.scan(lambda c, which: (step(c, which), None), carry, tuple(map(jnp.asarray, tiles)))[0]


def _all(found: list[jax.Array]) -> jax.Array | None:
    visible = None
    for one in found:
        visible = one if visible is None else visible & one
    return visible
