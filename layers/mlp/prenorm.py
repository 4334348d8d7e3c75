"""The root-mean-square norm before the products.

    rstd = (mean(x²) + epsilon)^-1/2,   x̂ = x rstd,   n = scale x̂

With g = scale dn the cotangent of x̂: dx = rstd (g - x̂ mean(g x̂)), dscale = Σ dn x̂. Nothing is saved: a block of rows has its norm again
where it is needed.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layers.core.numerics import safe_rsqrt, wide


def normalize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x̂ and rstd, of float32 or wider; both 0 for a row of zeros without epsilon."""
    x = x.astype(wide(x.dtype))
    rstd = safe_rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * rstd, rstd


def pull(dn: jax.Array, xhat: jax.Array, rstd: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and of the scale."""
    g = dn * scale.astype(dn.dtype)
    return rstd * (g - xhat * (g * xhat).mean(-1, keepdims=True)), (dn * xhat).sum(0)
