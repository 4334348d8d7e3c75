"""The heads of queries by the head of keys and values that they share."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split_heads(heads: int, kv_heads: int) -> tuple[int, int]:
    """kv heads and query heads to each; 1 and 1 where they are shared."""
    return (kv_heads, heads // kv_heads) if heads != 1 else (1, 1)


def group_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """(batch, time, heads, ...) to (batch, kv heads, group, time, ...)."""
    x = x.reshape(*x.shape[:2], *split_heads(x.shape[2], kv_heads), *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def merge_heads(x: jax.Array) -> jax.Array:
    """(batch, kv heads, group, time, ...) to (batch, time, heads, ...)."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])
