"""Lengths of vectors whose squares may be too large or too small for their dtype.

The entries are divided by a power of two near the largest of them, so nothing is rounded, then squared and added up. Powers are kept to those
that are normal numbers and whose reciprocals are: XLA takes subnormal numbers for 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.numerics import wide


def power_of_two(size: jax.Array) -> jax.Array:
    """The largest power of two that is not above `size`; 1 for what is not a positive finite number, and never so large or small that it or its
    reciprocal is subnormal."""
    limits = jnp.finfo(size.dtype)
    usable = (size > 0) & (size < jnp.inf)
    exponent = jnp.frexp(jnp.where(usable, size, 1))[1] - 1
    return jnp.ldexp(jnp.ones_like(size), jnp.clip(exponent, limits.minexp, -limits.minexp))


def scaled_squares(arrays: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """A power of two s, and the sum of the squares of |x| / s over all entries of the arrays: float32 or wider."""
    sizes = [jnp.abs(x).astype(_real_wide(x.dtype)) for x in arrays]
    start = jnp.zeros((), jnp.result_type(*sizes) if sizes else jnp.float32)
    scale = power_of_two(functools.reduce(jnp.maximum, (jnp.max(s, initial=0) for s in sizes), start))
    return scale, sum((jnp.sum(jnp.square(divided(s, scale.astype(s.dtype)))) for s in sizes), start)


def length(arrays: Sequence[Any]) -> jax.Array:
    """The 2-norm of all entries of the arrays together."""
    scale, squares = scaled_squares(arrays)
    return scale * jnp.sqrt(squares)


def row_lengths(x: jax.Array) -> jax.Array:
    """The 2-norm of `x` along its last axis, which stays with one entry."""
    scale = power_of_two(jnp.abs(x).max(-1, keepdims=True, initial=0))
    return scale * jnp.sqrt(jnp.square(divided(x, scale)).sum(-1, keepdims=True))


def divided(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale, for a power of two, as a product that stands by itself: of (x / s) (x / s) with a constant x XLA makes (x x) / (s s)."""
    return jnp.where(scale > 0, x * (1 / scale), 0)


def _real_wide(dtype: Any) -> Any:
    return jnp.finfo(wide(dtype)).dtype
