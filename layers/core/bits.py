"""Booleans kept as bits, eight to a byte."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from layers.core.blocks import count_lanes
from layers.core.sharding import explicit_sharding


def pack_bits(mask: jax.Array) -> jax.Array:
    """A mask of any shape as bytes, eight entries to one: (lanes, bytes), where the rows that lie on one device are a lane.

    The eighths of the flattened mask become the bits of one row of bytes: whole rows are combined, which costs less than
    neighbouring entries would. A mask that lies along explicit axes of a mesh otherwise than by rows stays as it is.
    """
    sharding = explicit_sharding(mask)
    if sharding is not None and any(sharding.spec[1:]):
        return mask
    lanes = count_lanes(mask) if mask.ndim else 1
    flat = (_by_lanes(mask.shape, lanes, mask) if mask.ndim else mask).reshape(lanes, -1)
    rows = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))).reshape(len(flat), 8, -1).astype(jnp.uint8)
    packed = rows[:, 0]
    for i in range(1, 8):
        packed = packed | (rows[:, i] << i)
    return packed


def unpack_bits(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask of this shape that `pack_bits` made `packed` of."""
    if packed.dtype == bool:
        return packed
    rows = [(packed >> i) & 1 for i in range(8)]
    flat = jnp.concatenate(rows, 1)[:, : math.prod(shape) // len(packed)].astype(bool)
    return (_by_lanes(shape, len(packed), flat) if shape else flat).reshape(shape)


def _by_lanes(shape: tuple[int, ...], lanes: int, x: jax.Array) -> jax.Array:
    """`x`, of which each lane has so many entries, as (lanes, rows, ...): along an explicit axis of a mesh XLA splits or joins one axis at a time."""
    return x.reshape(lanes, shape[0] // lanes, *shape[1:])
