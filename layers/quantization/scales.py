"""The scale of a symmetric quantiser, taken from the largest entry, and how products of what it divided are multiplied by it again."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def scale_to(high: float, largest: jax.Array) -> jax.Array:
    """`largest / high`: the scale with which the largest absolute value becomes the level `high`; 0 for 0.

    It is never subnormal, which XLA takes for 0 and whose reciprocal is infinite, and `high` times it is finite where `largest` is: both within
    the rounding of the result.
    """
    limits = jnp.finfo(largest.dtype)
    scale = jnp.clip(largest / high, limits.tiny, float(limits.max) / high * (1 - 2 * float(limits.eps)))
    return jnp.where((largest > 0) & (largest < jnp.inf), scale, largest)


def rescaled(product: jax.Array, *scales: jax.Array) -> jax.Array:
    """A product of two scaled matrices times their scales, the smaller first: so it overflows only where the result does."""
    product = product.astype(scales[0].dtype)
    if len(scales) == 1:
        return product * scales[0]
    return product * jnp.minimum(*scales) * jnp.maximum(*scales)
