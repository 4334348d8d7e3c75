"""A hash of 32-bit words, from which masks are drawn again in backward instead of being saved.

    x ^= x >> 16,  x *= 0x21f0aaad,  x ^= x >> 15,  x *= 0xd35a2d97,  x ^= x >> 15      (modulo 2³²)

Each step can be undone, so different words have different hashes. It is a hash for masks, not for cryptography.

Reference: Wellons, "Prospecting for Hash Functions", 2018: `lowbias32`, with constants found later; the form is that of MurmurHash3's finaliser.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

ODD = 0x9E3779B9
"""2³² over the golden ratio: multiples of it are spread evenly."""


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 words in which every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def below(words: jax.Array, probability: float) -> jax.Array:
    """True for uniform uint32 words with this probability, which lies in (0, 1)."""
    return words < jnp.uint32(min(round(probability * 2**32), 2**32 - 1))
