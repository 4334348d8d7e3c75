"""Losses of pairs of sequences, of which one was preferred, from the log-probabilities of both: the formulas of `linear_dpo`.

With h the log-probability of the chosen sequence less that of the rejected one, each less that of the reference where there is one:

    sigmoid, cpo   -(1 - s) log σ(β h) - s log σ(-β h)
    robust         (-(1 - s) log σ(β h) + s log σ(-β h)) / (1 - 2 s)
    hinge          max(0, 1 - β h)
    ipo            (h - 1 / (2 β))²
    simpo          as sigmoid, with β h - γ for β h

JAX differentiates them: a pair is one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

SMOOTHED, REFERENCE_FREE, AVERAGED = ("sigmoid", "robust", "cpo", "simpo"), ("cpo", "simpo"), ("ipo", "simpo")
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "simpo", "cpo")


@dataclass(frozen=True)
class Preference:
    """The kind of loss and its numbers.

    Attributes:
        loss_type: one of `LOSS_TYPES`.
        beta: multiplies the margin; for ipo the strength of the regularisation.
        smoothing: s, the probability that a preference is the wrong way round.
        gamma: the margin that simpo asks for.
    """

    loss_type: str
    beta: Any
    smoothing: Any = 0.0
    gamma: Any = 0.0

    def losses(self, h: jax.Array) -> jax.Array:
        """The loss of each pair."""
        if self.loss_type == "hinge":
            return jnp.maximum(1 - self.beta * h, 0)
        if self.loss_type == "ipo":
            return (h - 1 / (2 * self.beta)) ** 2
        margin, s = self.beta * h - (self.gamma if self.loss_type == "simpo" else 0), self.smoothing
        right, wrong = -(1 - s) * jax.nn.log_sigmoid(margin), -s * jax.nn.log_sigmoid(-margin)
        return (right - wrong) / (1 - 2 * s) if self.loss_type == "robust" else right + wrong
