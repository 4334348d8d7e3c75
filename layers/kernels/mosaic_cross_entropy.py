"""The softmax of rows of logits and its gradient, in one pass over them each way, on NVIDIA's Hopper.

A block of threads has a row. It goes through tiles of columns, of which each thread keeps the largest logit that it saw and the sum of
exp(z - largest); the threads meet once, at the end of the row. A last tile that is not whole begins earlier, so that it ends with the row, and
what the tile before it has seen does not count again. Rows may begin at any multiple of their elements' size: the widest loads that this allows
are taken.

An infinite largest logit has as its sum the number of classes that reach it, as in `losses/softmax.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.kernels.mosaic import LANES, full, iota, laid, load, pallas, run, strided

LEAST, TILE = LANES, 1024
"""Classes that there must be; columns that a block takes at once."""


def forward(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each row of (rows, vocab), and Σ exp(logit - largest), in float32."""
    rows, columns = logits.shape
    tile, layout = _tiles(columns)

    def body(z_ref: Any, largest_ref: Any, total_ref: Any) -> None:
        r = lax.axis_index("row")

        def step(i: jax.Array, seen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            largest, total = seen
            at, new = _columns(i, columns, tile, layout)
            z = jnp.where(new, load(z_ref.at[r, at], layout).astype(jnp.float32), -jnp.inf)
            higher = jnp.maximum(largest, z)
            return higher, total * _share(largest, higher) + jnp.where(new, _share(z, higher), 0.0)

        start = full(tile, -jnp.inf, layout), full(tile, 0.0, layout)
        largest, total = lax.fori_loop(0, -(-columns // tile), step, start)
        highest = jnp.max(largest)
        largest_ref[r] = highest
        total_ref[r] = jnp.sum(total * _share(largest, highest))

    out = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return run(body, (logits,), rough=_is_narrow(logits), grid=(rows,), grid_names=("row",), out_type=(out, out))


def backward(logits: jax.Array, largest: jax.Array, factor: jax.Array, hit: jax.Array, classes: jax.Array) -> jax.Array:
    """factor exp(logit - largest) - hit [column = class] for each row, of the dtype of the logits; 0 in all of a row where both are 0.

    Args:
        logits: (rows, vocab).
        largest: the largest of each row.
        factor, hit: (rows,), float32.
        classes: (rows,), integers.
    """
    rows, columns = logits.shape
    tile, layout = _tiles(columns)

    def body(z_ref: Any, largest_ref: Any, factor_ref: Any, hit_ref: Any, class_ref: Any, dz_ref: Any) -> None:
        r = lax.axis_index("row")
        largest, factor, hit, label = largest_ref[r], factor_ref[r], hit_ref[r], class_ref[r]

        def step(i: jax.Array, _: Any) -> None:
            at, _ = _columns(i, columns, tile, layout)  # what two tiles share is written twice, and is the same
            share = factor * _share(load(z_ref.at[r, at], layout).astype(jnp.float32), largest)
            is_class: Any = at.start + iota(tile, layout) == label
            dz = jnp.where(factor == 0.0, 0.0, share) - jnp.where(is_class, hit, 0.0)
            dz_ref[r, at] = dz.astype(dz_ref.dtype)

        lax.fori_loop(0, -(-columns // tile), step, None)

    arrays = (logits, largest, factor, hit, classes.astype(jnp.int32))
    out = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    return run(body, arrays, rough=_is_narrow(logits), grid=(rows,), grid_names=("row",), out_type=out)


def _share(z: Any, largest: Any) -> Any:
    """exp(z - largest), 1 where they are equal: infinities too."""
    return jnp.where(z == largest, 1.0, jnp.exp(z - largest))


def _is_narrow(x: jax.Array) -> bool:
    return x.dtype.itemsize < 4


def _tiles(columns: int) -> tuple[int, Any]:
    """The columns of a tile, and its layout: of loads of at most 16 bytes whose places are multiples of their size in every row."""
    tile = min(TILE, columns // LANES * LANES)
    vector = next(v for v in (8, 4, 2, 1) if columns % v == 0 and tile % (LANES * v) == 0)
    return tile, strided(tile, vector)


def _columns(i: jax.Array, columns: int, tile: int, layout: Any) -> tuple[Any, jax.Array]:
    """Those of tile i, and which of them no tile before it has."""
    start = jnp.minimum(i * tile, columns - tile)
    return pallas().ds(start, tile), laid(start + iota(tile, layout) >= i * tile, layout)
