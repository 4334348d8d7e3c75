"""Proximal policy optimisation on hidden states of a policy, without its logits: the clipped loss of its tokens and the bonus for its entropy.

    loss = the mean over tokens of the clipped loss (`policy.py`) - c H,   H the entropy of the softmax

Log-probabilities, entropy and their gradients are those of `linear_log_prob.py`. The value function has a head of one number, which no rule makes
smaller: its loss is `optax.losses.squared_error`.

Reference: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Stiennon et al., "Learning to summarize from human feedback", 2020.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.losses.arguments import check_head, read_options
from layers.losses.policy import PolicyMetrics, is_used, log_ratio_to, read_clip
from layers.losses.targets import Options, mean
from layers.losses.tokens import Model, read_advantages, read_tokens


def linear_ppo(
    x: Float[Array, "*batch time features"],
    kernel: Float[Array, "features vocab"],
    ids: Int[Array, "*batch time"],
    advantages: Float[Array, "*batch"] | Float[Array, "*batch time"],
    bias: Float[Array, " vocab"] | None = None,
    *,
    old_log_probs: Float[Array, "*batch time"] | None = None,
    old_x: Float[Array, "*batch time old_features"] | None = None,
    old_kernel: Float[Array, "old_features vocab"] | None = None,
    old_bias: Float[Array, " vocab"] | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    entropy_coefficient: float = 0.0,
    temperature: float = 1.0,
    where: Float[Array, "*#batch #time"] | None = None,
    ignore_index: int = -100,
    logit_soft_cap: float | None = None,
    return_metrics: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the policy's loss of proximal policy optimisation for tokens that were sampled, the mean over those that count.

    Args:
        x: the policy's hidden states at the places before each token.
        kernel, bias: the policy's head: its logits are `x @ kernel + bias`.
        ids: the tokens that were sampled; `ignore_index` where none counts (prompt, padding).
        advantages: of each token, or of each sequence; a constant.
        old_log_probs: what the policy that sampled gave to each token, a constant; or its head's `old_x`, `old_kernel` and `old_bias`. Without
            either the policy is the one that sampled: the ratio is 1, and has the gradient.
        epsilon: how far below 1 the ratio is followed, and above.
        epsilon_high: how far above 1, where it differs.
        delta: the largest ratio where the advantage is negative, above 1 + epsilon_high; None for none.
        entropy_coefficient: is multiplied by the mean entropy, which the loss rewards.
        temperature: divides the logits of both policies, as it did when the tokens were sampled.
        where: how much each token counts, a mask or weights. What does not count is not touched.
        ignore_index: a place with this id does not count. An id that is neither this nor in [0, vocab) gives NaN.
        logit_soft_cap: c in c tanh(logits / c), in both policies; None for none.
        return_metrics: whether to return a `PolicyMetrics` too, whose `kl` is 0: there is no reference.
        block_size: rows in a block; None to choose.

    Returns:
        The loss, a float32 scalar or wider; with `return_metrics` a tuple of it and them.

    Raises:
        ValueError: for shapes that do not fit, a value out of its range, a head that is given in part.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_ppo"
    given = read_options(who, ignore_index=ignore_index, logit_soft_cap=logit_soft_cap, temperature=temperature, block_size=block_size)
    clip = read_clip(who, epsilon, epsilon_high, delta)
    coefficient = checks.number(who, "entropy_coefficient", entropy_coefficient, traced=True)
    return_metrics = checks.flag(who, "return_metrics", return_metrics)
    x, kernel, bias = check_head(who, x, kernel, bias)
    tokens = read_tokens(who, x, ids, where, kernel.shape[1], Options(**given, reduction="none"))
    advantages, weight = read_advantages(who, advantages, tokens), tokens.weight
    old = tokens.constant(who, Model("old", old_x, old_kernel, old_bias), old_log_probs, kernel.shape[1], Options(**given, reduction="none"))

    rewarded = is_used(coefficient)
    options = Options(**given, reduction="none", return_entropy=rewarded or return_metrics)
    log_prob, _, _, entropy, _ = tokens.under(x, kernel, bias, options)
    log_ratio = log_ratio_to(old, log_prob)
    loss = mean(clip.losses(log_prob, log_ratio, advantages), weight)
    loss = loss - coefficient * mean(entropy, weight) if rewarded else loss
    if not return_metrics:
        return loss
    return loss, PolicyMetrics.of(weight, jnp.zeros_like(log_prob), entropy, log_ratio, advantages, clip)
