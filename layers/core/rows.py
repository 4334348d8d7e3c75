"""Rows: arrays with one axis in place of any batch axes, as the rules of layers take them."""

from __future__ import annotations

import math

import jax


def as_rows(x: jax.Array, batch: tuple[int, ...] | None = None) -> jax.Array:
    """`x` with one axis in place of the batch axes, its first; by default all axes but the last."""
    batch = x.shape[:-1] if batch is None else batch
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])
