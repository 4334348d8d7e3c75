"""Losses of tokens that a policy sampled, from their log-probabilities and advantages: the formulas of `linear_grpo` and `linear_ppo`.

With r the probability of a token over what it was when it was sampled, A its advantage, and d = log ref - log π,

    clipped    -min(min(r, δ) A, clip(r, 1 - ε, 1 + ε') A) = -A exp(min(log r, log(1 + ε')))                       for A >= 0
                                                             -A exp(min(max(log r, log(1 - ε)), log δ))            for A < 0
    cispo      -A min(r, ε') log π,   min(r, ε') a constant
    divergence exp(d) - d - 1,  never negative, in the mean over tokens of the policy KL(π || ref)

where r of a sequence is the exponential of the mean of log r over its tokens. Clipped as logarithms, no ratio overflows that does not count.

JAX differentiates them: a token is one number.

Reference: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Shao et al., "DeepSeekMath", 2024 (grpo); MiniMax, "MiniMax-M1", 2025
(cispo); Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2020 (δ); Schulman, "Approximating KL Divergence",
2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.numerics import product, safe_reciprocal


@dataclass(frozen=True)
class Clip:
    """Between what ratios a policy is rewarded.

    Attributes:
        low: ε, how far below 1.
        high: ε', how far above 1; of cispo the largest ratio.
        most: δ, the largest ratio where the advantage is negative; None for none.
        cispo: whether the ratio is a constant, and the log-probability has the gradient.
    """

    low: Any
    high: Any
    most: Any = None
    cispo: bool = False

    def losses(self, log_prob: jax.Array, log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
        """The loss of each token."""
        if self.cispo:
            return -advantage * lax.stop_gradient(jnp.exp(jnp.minimum(log_ratio, jnp.log(self.high)))) * log_prob
        rewarded = jnp.minimum(log_ratio, jnp.log1p(self.high))
        punished = jnp.maximum(log_ratio, jnp.log1p(-self.low))
        punished = punished if self.most is None else jnp.minimum(punished, jnp.log(self.most))
        return -advantage * jnp.exp(jnp.where(advantage < 0, punished, rewarded))

    def clipped(self, log_ratio: jax.Array, advantage: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which tokens have no gradient since their ratio is too small, and which since it is too large."""
        high = jnp.log(self.high) if self.cispo else jnp.log1p(self.high)
        low = jnp.zeros_like(log_ratio, bool) if self.cispo else (log_ratio < jnp.log1p(-self.low)) & (advantage < 0)
        return low, (log_ratio > high) & (advantage > 0)


def divergence(log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """How far each token's log-probability is from that of a reference."""
    d = reference - log_prob
    return jnp.expm1(d) - d


class PolicyMetrics(NamedTuple):
    """What is watched in training; means over the tokens that count, constants.

    Attributes:
        kl: the divergence from the reference; 0 without one.
        entropy: of the policy.
        ratio: the policy's probability over that of when the tokens were sampled.
        clipped_low, clipped_high: the share of tokens whose ratio is below or above what is rewarded.
    """

    kl: jax.Array
    entropy: jax.Array
    ratio: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array


def mean(x: jax.Array, weight: jax.Array, axis: int | None = None) -> jax.Array:
    """The mean of what counts; 0 where nothing does."""
    return product(weight, x).sum(axis) * safe_reciprocal(weight.sum(axis))
