"""The softmax of rows of scores z over a temperature τ, from two numbers a row: the largest score, and Σ exp((z - largest) / τ).

    log p = (z - largest) / τ - log total,   lse = largest / τ + log total,   entropy = log total - Σ p (z - largest) / τ

The difference is taken before it is divided, so that no digits are lost in large scores. What is computed twice may be rounded in two ways (XLA
multiplies by 1 / τ in one place and divides in the other), so a difference is never above 0. A row whose largest score is infinite is taken to its
limit: the classes that reach it share all the probability.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.numerics import is_known, product


class Softmax(NamedTuple):
    """The largest score of each row, and Σ exp((score - largest) / temperature): together the logsumexp."""

    largest: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, z: jax.Array, temperature: Any = 1.0) -> Softmax:
        largest = lax.stop_gradient(z.max(-1))
        return cls(largest, jnp.exp(_below(z, largest, temperature)).sum(-1))

    @property
    def log_sum(self) -> jax.Array:
        return jnp.log(self.total)

    def logsumexp(self, temperature: Any = 1.0) -> jax.Array:
        return over(self.largest, temperature) + self.log_sum

    def log_p(self, z: jax.Array, temperature: Any = 1.0) -> jax.Array:
        """Of rows of scores, or of some scores of each row."""
        return _below(z, self.largest, temperature) - self.log_sum[:, None]

    def p(self, z: jax.Array, temperature: Any = 1.0) -> jax.Array:
        return jnp.exp(_below(z, self.largest, temperature)) * (1 / self.total)[:, None]

    def entropy(self, z: jax.Array, temperature: Any = 1.0) -> jax.Array:
        below = _below(z, self.largest, temperature)
        return self.log_sum - product(jnp.exp(below), below).sum(-1) / self.total


def over(z: jax.Array, temperature: Any) -> jax.Array:
    return z if is_known(temperature, 1) else z / temperature


def _below(z: jax.Array, largest: jax.Array, temperature: Any) -> jax.Array:
    """(z - largest) / temperature."""
    largest = largest[:, None]
    infinite = jnp.isinf(largest)
    below = jnp.where(infinite, jnp.where(z == largest, 0, -jnp.inf), z) - jnp.where(infinite, 0, largest)
    return jnp.where(below > 0, 0, over(below, temperature))
