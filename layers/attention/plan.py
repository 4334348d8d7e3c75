"""What is settled when attention is traced: which scores are left out, how large the blocks are, and which tiles there are.

Which tiles a causal mask or a window leaves is known then, so the loop runs over a list of those only. A tile has at most half as many
elements as the queries, so that the few that are alive at once are no larger than they are at any length, and where it can be, it is small
enough for the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from layers.core.blocks import block_size
from layers.core.machine import choose, on_accelerator

LARGEST, EFFICIENT, SMALLEST = (512, 256), 128, 16
"""Of a block: where it may grow to, shrink to so that few hidden scores are computed, and shrink to so that tiles stay smaller than the queries."""
PARALLEL = 1 << 23
"""The products in a tile of one head from which on XLA's CPU compiler computes it on several cores: twice as fast."""
FAR, ROOM = (1024, 1024), 8
"""Where a block may grow to on an accelerator, which waits for each tile, and how much larger its tiles may be."""


class Hidden(NamedTuple):
    """The arrays that decide which scores are left out, and which weights are dropped: words of a key, or those that are spared.

    The rate is here only where it is an array.
    """

    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None
    query_segments: Any = None
    key_segments: Any = None
    offsets: Any = None
    words: Any = None
    rate: Any = None
    spared: Any = None

    @property
    def drops(self) -> bool:
        return self.words is not None or self.spared is not None


@dataclass(frozen=True)
class Options:
    """What is known when the program is traced.

    Attributes:
        scale: of the scores.
        cap: a score s becomes cap tanh(s / cap); None for s.
        low, high: bounds of the query's position less the key's; None for no bound.
        rate: the probability that a weight is dropped, where weights are dropped and no such array is given.
        shared_dropout: whether all heads and batch elements drop the same weights.
        blocks: the sizes of the blocks of queries and keys; None to choose.
        implementation: "xla", or the kernel that computes the call.
    """

    scale: float = 1.0
    cap: float | None = None
    low: int | None = None
    high: int | None = None
    rate: float = 0.0
    shared_dropout: bool = False
    blocks: tuple[int, int] | None = None
    implementation: str = "xla"

    @property
    def bounded(self) -> bool:
        return self.low is not None or self.high is not None


def choose_blocks(queries: int, keys: int, head_dim: int, narrow: bool = False) -> tuple[int, int]:
    """The sizes of the blocks of queries and of keys; `narrow` for 16-bit queries."""
    (rows, columns), whole = map(min, (queries, keys), choose(LARGEST, FAR)), max(queries, keys) * head_dim * choose(1, ROOM)

    def halved() -> tuple[int, int]:
        return (-(-rows // 2), columns) if rows > columns else (rows, -(-columns // 2))

    def large() -> bool:
        """Whether a tile, or it and the slices that it is made from, are too much of the queries: both are float32."""
        tile = rows * columns
        share = 0.5 if narrow or tile * head_dim < PARALLEL else 1.0
        return tile > share * whole or tile + (rows + columns) * head_dim > whole * (0.7 if narrow else 1.5)

    while large() and max(rows, columns) > SMALLEST:
        rows, columns = halved()
    while not on_accelerator() and rows * columns * head_dim < PARALLEL and max(rows, columns) > EFFICIENT:
        rows, columns = halved()
    return block_size(queries, rows), block_size(keys, columns)


def list_tiles(lengths: tuple[int, int], blocks: tuple[int, int], low: int | None, high: int | None) -> np.ndarray:
    """The tiles in which a score is left by the bounds: rows of (block of queries, block of keys)."""
    if 0 in lengths:
        return np.zeros((0, 2), np.int32)
    (q0, q1), (k0, k1) = (_first_and_last(n, b) for n, b in zip(lengths, blocks, strict=True))
    kept = np.ones((len(q0), len(k0)), bool)
    if low is not None:
        kept &= q1[:, None] - k0 >= low
    if high is not None:
        kept &= q0[:, None] - k1 <= high
    return np.argwhere(kept).astype(np.int32)


def _first_and_last(length: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.arange(0, length, block)
    return first, np.minimum(first + block, length) - 1
