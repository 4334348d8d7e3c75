"""The score matrix of attention in tiles: loops over all of them. `plan.py` has their sizes and their list, `tile.py` what one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layers.attention import plan
from layers.attention.heads import split_heads
from layers.attention.plan import Hidden, Options
from layers.attention.tile import Layout, Tile
from layers.core import compat
from layers.core.numerics import wide
from layers.core.sharding import sharded_as


class Grid(Layout):
    """All tiles of one call of attention."""

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, hidden: Hidden, options: Options) -> Grid:
        lengths = q.shape[1], k.shape[1]
        blocks = options.blocks or plan.choose_blocks(*lengths, q.shape[3], wide(q.dtype) != q.dtype)
        return cls(lengths, blocks, (q.shape[0], *split_heads(q.shape[2], k.shape[2])), hidden, options)

    def start_total(self, x: jax.Array, dtype: Any, zero: Any, side: int) -> jax.Array | None:
        """What `Tile.add_up` adds up in: one block of `x`, in a wider dtype; None where `x` has that dtype."""
        return None if x.dtype == dtype else sharded_as(jnp.full((x.shape[0], self.blocks[side], *x.shape[2:]), zero, dtype), x)

    def fold(self, body: Callable[[Any, Tile], Any], carry: Any, *, outer: int = 0) -> Any:
        """`body(carry, tile)` over all tiles, those of a block of the outer side one after the other.

        Differentiated once more, it computes each tile's scores again.
        """
        bounds = (self.options.low, self.options.high) if self.hidden.offsets is None else (None, None)
        tiles = plan.list_tiles(self.lengths, self.blocks, *bounds)
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
