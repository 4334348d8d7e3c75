"""A hash of 32-bit words, from which masks are drawn again in backward instead of being saved.

    x ^= x >> 16,  x *= 0x21f0aaad,  x ^= x >> 15,  x *= 0xd35a2d97,  x ^= x >> 15      (modulo 2³²)

Each step can be undone, so different words have different hashes. It is a hash for masks, not for cryptography.

Reference: Wellons, "Prospecting for Hash Functions", 2018: `lowbias32`, with constants found later; the form is that of MurmurHash3's finaliser.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from layers.core.numerics import wide

ODD = 0x9E3779B9
"""2³² over the golden ratio: multiples of it are spread evenly."""


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 words in which every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def spared(words: jax.Array, rate: Any) -> jax.Array:
    """False for uniform uint32 words with probability `rate`, which lies in [0, 1] and may be an array without axes."""
    if isinstance(rate, jax.Array):
        dropped = jnp.minimum(rate.astype(wide(rate.dtype)) * 2.0**32, 2.0**32 - 256).astype(jnp.uint32)  # as close to 2³² as a float32 comes
        return (words <= ~dropped) & (rate < 1)
    kept = 2**32 - round(rate * 2**32)
    return words <= jnp.uint32(kept - 1) if kept else jnp.zeros(words.shape, bool)


def masked(x: jax.Array, mask: jax.Array, rate: Any) -> jax.Array:
    """x / (1 - rate) where the mask is set, else 0."""
    return jnp.where(mask, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def hash_bits(words: jax.Array, shape: tuple[int, ...], rows: jax.Array | None = None) -> jax.Array:
    """A uniform uint32 for each index, a function of the words of a key; or for those in some `rows`, places along the first axis.

    A symbolic size (`jax.export`) gives what the same number does, in arrays of up to 2³² elements, but not before another symbolic axis.
    """
    k0, k1 = mixed_key(words)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        if axis or rows is None:
            position = lax.broadcasted_iota(jnp.uint32, shape if rows is None else (1, *shape[1:]), axis)
        else:
            position = rows.astype(jnp.uint32).reshape(-1, *(1 for _ in shape[1:]))
        if is_symbolic_dim(stride) or stride >= 2**32:
            k1 = mix(k1 + position * jnp.uint32(ODD))
        else:
            index = index + position * jnp.uint32(stride)
            if is_symbolic_dim(shape[axis]):
                high = _quotient(position, min(2**32 // stride, 2**32 - 1))
                k1 = jnp.where(high > 0, mix(k1 + high * jnp.uint32(ODD)), k1)
            elif stride * shape[axis] > 2**32:
                k1 = mix(k1 + _quotient(position, 2**32 // stride) * jnp.uint32(ODD))
        stride *= shape[axis] if is_symbolic_dim(shape[axis]) else max(shape[axis], 1)
    return mix(mix(index + k0) ^ k1)


def _quotient(position: jax.Array, divisor: int) -> jax.Array:
    """Behind a barrier, as XLA computes a quotient of constants while it compiles, which takes minutes for the 2³² elements that this is for."""
    return lax.div(position, lax.optimization_barrier(jnp.uint32(divisor)))


def mixed_key(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words in which every bit of the key acts on every bit."""
    k0, k1 = jnp.uint32(ODD), jnp.uint32(0x85EBCA6B)
    for i in range(math.prod(words.shape)):
        w = words.reshape(-1)[i]
        k0 = mix(k0 ^ w) + k1
        k1 = mix(k1 + k0)
    return k0, k1
