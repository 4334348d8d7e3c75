"""Group-relative policy optimisation, and what came of it, on hidden states of a policy, without its logits.

    loss = Σ over tokens of (the clipped loss + β the divergence from a reference), each a number a token (`policy.py`), over

    grpo, gspo    the tokens of its sequence, then the mean over sequences
    bnpo          all tokens that count
    dapo, cispo   the same, or `num_items`
    dr_grpo       sequences times `max_completion_length`

Log-probabilities and their gradient are those of `linear_log_prob.py`.

Reference: Shao et al., "DeepSeekMath", 2024 (grpo); Liu et al., "Understanding R1-Zero-Like Training", 2025 (dr_grpo); Yu et al., "DAPO", 2025;
MiniMax, "MiniMax-M1", 2025 (cispo); Zheng et al., "Group Sequence Policy Optimization", 2025 (gspo); names and defaults as in TRL.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.numerics import product
from layers.losses.arguments import check_head, read_options
from layers.losses.policy import PolicyMetrics, divergence, is_used, log_ratio_to, read_clip
from layers.losses.targets import Options, mean
from layers.losses.tokens import Model, read_advantages, read_tokens

LOSS_TYPES, LEVELS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"), ("token", "sequence")


def linear_grpo(
    x: Float[Array, "*batch time features"],
    kernel: Float[Array, "features vocab"],
    ids: Int[Array, "*batch time"],
    advantages: Float[Array, "*batch"] | Float[Array, "*batch time"],
    bias: Float[Array, " vocab"] | None = None,
    *,
    loss_type: str = "dapo",
    old_log_probs: Float[Array, "*batch time"] | None = None,
    old_x: Float[Array, "*batch time old_features"] | None = None,
    old_kernel: Float[Array, "old_features vocab"] | None = None,
    old_bias: Float[Array, " vocab"] | None = None,
    reference_log_probs: Float[Array, "*batch time"] | None = None,
    reference_x: Float[Array, "*batch time reference_features"] | None = None,
    reference_kernel: Float[Array, "reference_features vocab"] | None = None,
    reference_bias: Float[Array, " vocab"] | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str | None = None,
    max_completion_length: int | None = None,
    num_items: Any = None,
    temperature: float = 1.0,
    where: Float[Array, "*#batch #time"] | None = None,
    ignore_index: int = -100,
    logit_soft_cap: float | None = None,
    return_metrics: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the loss of group-relative policy optimisation, or of a variant, for completions that were sampled and rewarded.

    Args:
        x: the policy's hidden states at the places before each token of the completions.
        kernel, bias: the policy's head: its logits are `x @ kernel + bias`.
        ids: the tokens that were sampled; `ignore_index` where none counts (prompt, padding).
        advantages: of each completion, or of each token; a constant.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", or "gspo", which is grpo with the ratio of whole sequences.
        old_log_probs: what the policy that sampled gave to each token, a constant; or its head's `old_x`, `old_kernel` and `old_bias`. Without
            either the policy is the one that sampled: the ratio is 1, and has the gradient.
        reference_log_probs: what the reference gave to each token, a constant; or `reference_x`, `reference_kernel` and `reference_bias`.
        beta: multiplies the divergence from the reference.
        epsilon: how far below 1 the ratio is followed, and above.
        epsilon_high: how far above 1, where it differs; of cispo, which needs it, the largest ratio.
        delta: the largest ratio where the advantage is negative, above 1 + epsilon_high; None for none.
        importance_sampling_level: "token" or "sequence": whose ratio; None for "sequence" with gspo, else "token".
        max_completion_length: what dr_grpo divides by; None for time.
        num_items: what dapo and cispo divide by, where tokens of other batches belong to the same step; None for the tokens that count.
        temperature: divides the logits of all models, as it did when the tokens were sampled.
        where: how much each token counts, a mask or weights. What does not count is not touched.
        ignore_index: a place with this id does not count. An id that is neither this nor in [0, vocab) gives NaN.
        logit_soft_cap: c in c tanh(logits / c), in all models; None for none.
        return_metrics: whether to return a `PolicyMetrics` too.
        block_size: rows in a block; None to choose.

    Returns:
        The loss, a float32 scalar or wider; with `return_metrics` a tuple of it and them.

    Raises:
        ValueError: for shapes that do not fit, a value out of its range, a head that is given in part, beta without a reference.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_grpo"
    given = read_options(who, ignore_index=ignore_index, logit_soft_cap=logit_soft_cap, temperature=temperature, block_size=block_size)
    options = Options(**given, reduction="none")
    loss_type = checks.choice(who, "loss_type", loss_type, LOSS_TYPES)
    level = checks.choice(who, "importance_sampling_level", importance_sampling_level, (*LEVELS, None))
    level = level or ("sequence" if loss_type == "gspo" else "token")
    beta = checks.number(who, "beta", beta, "[0, inf)", traced=True)
    clip = read_clip(who, epsilon, epsilon_high, delta, cispo=loss_type == "cispo")
    length = checks.integer(who, "max_completion_length", max_completion_length, "[1, inf)", optional=True)
    items = checks.number(who, "num_items", num_items, "(0, inf)", traced=True, optional=True)
    return_metrics = checks.flag(who, "return_metrics", return_metrics)
    x, kernel, bias = check_head(who, x, kernel, bias)
    tokens = read_tokens(who, x, ids, where, kernel.shape[1], options)
    advantages, weight = read_advantages(who, advantages, tokens), tokens.weight
    old = tokens.constant(who, Model("old", old_x, old_kernel, old_bias), old_log_probs, kernel.shape[1], options)
    reference = tokens.constant(who, Model("reference", reference_x, reference_kernel, reference_bias), reference_log_probs, kernel.shape[1], options)
    held = is_used(beta)
    if held and reference is None:
        raise ValueError(
            f"{who}: beta is {checks.shown(beta)}, which needs a reference: give reference_log_probs, or reference_x and reference_kernel"
        )

    log_prob, _, _, entropy, _ = tokens.under(x, kernel, bias, Options(**given, reduction="none", return_entropy=return_metrics))
    log_ratio = log_ratio_to(old, log_prob)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(mean(log_ratio, weight, -1)[..., None], tokens.batch)
    losses = clip.losses(log_prob, log_ratio, advantages)
    if held and reference is not None:
        losses = losses + beta * divergence(log_prob, reference)
    loss = _over(loss_type, losses, weight, length, items)
    if not return_metrics:
        return loss
    kl = jnp.zeros_like(log_prob) if reference is None else divergence(log_prob, reference)
    return loss, PolicyMetrics.of(weight, kl, entropy, log_ratio, advantages, clip)


def _over(loss_type: str, losses: Any, weight: Any, length: int | None, items: Any) -> Any:
    """The losses of tokens as one number."""
    if loss_type in ("grpo", "gspo"):
        per_sequence = mean(losses, weight, -1)
        return per_sequence.sum() / max(per_sequence.size, 1)
    if loss_type == "bnpo" or (loss_type != "dr_grpo" and items is None):
        return mean(losses, weight)
    total = product(weight, losses).sum()
    return total / (max(weight.size // max(weight.shape[-1], 1), 1) * (length or max(weight.shape[-1], 1)) if loss_type == "dr_grpo" else items)
