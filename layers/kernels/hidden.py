"""What no query sees, and queries that see nothing: kernels multiply such by weights of 0, and give no certain value for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FAR = 1e30
"""A logsumexp at which every weight is 0."""


def cleared(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """`x` (batch, time, heads, ...) with zeros where `kept` (batch, time) does not hold: it may be NaN there."""
    return x if kept is None else jnp.where(kept.reshape(*kept.shape, *(1,) * (x.ndim - 2)), x, 0)


def finite_logsumexp(lse: jax.Array) -> jax.Array:
    """lse, and where it is infinite one at which every weight is 0; NaN stays."""
    return jnp.where(jnp.isinf(lse), FAR, lse)
