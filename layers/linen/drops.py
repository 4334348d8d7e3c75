"""Flax's Linen dropout, with the backward pass of this library's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen

from layers.regularization.dropout import dropout


class Dropout(linen.Dropout):
    """`flax.linen.Dropout`: the same arguments and random streams; backward keeps the key only.

    Attributes:
        generator: as in `layers.dropout`: with "threefry" the masks are Flax's own, and slower to make.
    """

    generator: str = "hash"

    @linen.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None, rng: Any = None) -> Any:
        deterministic = linen.merge_param("deterministic", self.deterministic, deterministic)
        if deterministic or self.rate == 0:
            return inputs
        if self.rate == 1:
            return jnp.zeros_like(inputs)
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return dropout(inputs, key, rate=self.rate, broadcast_dims=self.broadcast_dims, generator=self.generator)
