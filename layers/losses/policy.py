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

from layers.core import checks, compat
from layers.losses.targets import mean


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
    """Numbers to watch while a policy is trained, without a gradient: means over the tokens that count.

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

    @classmethod
    def of(cls, weight: jax.Array, kl: jax.Array, entropy: jax.Array, log_ratio: jax.Array, advantage: jax.Array, clip: Clip) -> PolicyMetrics:
        """From what each token has, (*batch, time)."""
        watched = (kl, entropy, jnp.exp(log_ratio), *clip.clipped(log_ratio, advantage))
        return cls(*(lax.stop_gradient(mean(y.astype(weight.dtype), weight)) for y in watched))


def is_used(factor: Any) -> bool:
    """Whether what is multiplied by this has to be computed: where it is traced, or not 0."""
    return isinstance(factor, compat.Tracer) or float(factor) != 0


def log_ratio_to(old: jax.Array | None, log_prob: jax.Array) -> jax.Array:
    """The logarithm of r; without an `old` policy it is 0, and has the gradient."""
    return log_prob - (lax.stop_gradient(log_prob) if old is None else old)


def read_clip(who: str, epsilon: Any, epsilon_high: Any, delta: Any, *, cispo: bool = False) -> Clip:
    """Between what ratios a policy is rewarded, checked."""
    low = checks.number(who, "epsilon", epsilon, "[0, 1]", traced=True)
    high = checks.number(who, "epsilon_high", epsilon_high, "(0, inf)" if cispo else "[0, inf)", traced=True, optional=True)
    if high is None and cispo:
        raise ValueError(f"{who}: epsilon_high is None, but loss_type='cispo' needs the largest ratio that it follows, such as 5.0")
    high = low if high is None else high
    most = checks.number(who, "delta", delta, "(1, inf)", traced=True, optional=True)
    if most is not None and cispo:
        raise ValueError(f"{who}: delta is {checks.shown(most)}, but must be None with loss_type='cispo', which has none")
    if most is not None and not any(isinstance(y, compat.Tracer) for y in (most, high)) and not float(most) > 1 + float(high):
        raise ValueError(f"{who}: delta is {most}, but must be above 1 + epsilon_high = {1 + high}")
    return Clip(low, high, most, cispo)
