"""The root-mean-square norm before the products.

    root = (mean(x²) + epsilon)^1/2,   x̂ = x / root,   n = (scale + scale_offset) x̂

With g = (scale + scale_offset) dn the cotangent of x̂: dx = (g - x̂ mean(g x̂)) / root, dscale = Σ dn x̂. Nothing is saved: a block of rows has its
norm again where it is needed.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.core.numerics import wide
from layers.core.roots import mean_root, reciprocal_factors, where_exact


def normalize(x: jax.Array, epsilon: Any) -> tuple[jax.Array, jax.Array]:
    """x̂ and root, of float32 or wider; both 0 for a row of zeros without epsilon."""
    x = x.astype(wide(x.dtype))
    square = lambda scale: jnp.square(x * scale).mean(-1, keepdims=True)
    (root,) = where_exact(lambda scale: (mean_root(square(scale), epsilon, scale),), x.dtype, epsilon)
    first, second = reciprocal_factors(root)
    return x * first * second, root


def pull(dn: jax.Array, xhat: jax.Array, root: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and of the scale."""
    first, second = reciprocal_factors(root)
    g = dn * factor.astype(dn.dtype)
    return (g - xhat * (g * xhat).mean(-1, keepdims=True)) * second * first, (dn * xhat).sum(0)
