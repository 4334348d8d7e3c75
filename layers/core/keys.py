"""One random key, from what users give for one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def as_key(name: str, key: Any) -> jax.Array:
    """One typed key.

    Args:
        name: who asks, and for which argument: "dropout: key".
        key: a key of `jax.random`, typed or as its words, or an integer seed.
    """
    if isinstance(key, int):
        return jax.random.key(key)
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
            return jax.random.key(key)
        if key.dtype != jnp.uint32:
            raise TypeError(f"{name} is an array {key.dtype}{list(key.shape)}, but must be a key: jax.random.key(seed)")
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        raise ValueError(f"{name} has shape {key.shape}, but must be one key: jax.vmap over an array of keys")
    return key
