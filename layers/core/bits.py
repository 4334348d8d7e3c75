"""Booleans kept as bits, eight to a byte."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def pack_bits(mask: jax.Array) -> jax.Array:
    """A mask of any shape as bytes, eight entries to one.

    The eighths of the flattened mask become the bits of one row of bytes: whole rows are combined, which costs less than
    neighbouring entries would.
    """
    flat = mask.reshape(-1)
    rows = jnp.pad(flat, (0, -flat.size % 8)).reshape(8, -1).astype(jnp.uint8)
    packed = rows[0]
    for i in range(1, 8):
        packed = packed | (rows[i] << i)
    return packed


def unpack_bits(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask of this shape that `pack_bits` made `packed` of."""
    rows = [(packed >> i) & 1 for i in range(8)]
    return jnp.concatenate(rows)[: math.prod(shape)].reshape(shape).astype(bool)
