"""Kahneman-Tversky optimisation on hidden states of a policy and of a reference model, without their logits: each sequence was liked or not.

    h = log π(sequence) - log ref(sequence),   z = max(0, mean of h over sequences that belong to other prompts), a constant

    kto                 liked: 1 - σ(β (h - z)),   not: 1 - σ(β (z - h))
    apo_zero_unpaired   liked: 1 - σ(β h),         not: σ(β h)

each times the weight of its kind. Log-probabilities and their gradient are those of `linear_log_prob.py`; the reference gets none.

Reference: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024; D'Oosterlinck et al., "Anchored Preference
Optimization", 2024; names and defaults as in TRL.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from layers.core import checks
from layers.losses.arguments import check_head, check_where, read_options
from layers.losses.targets import Options, reduce_weighted
from layers.losses.tokens import Model, read_tokens

LOSS_TYPES = ("kto", "apo_zero_unpaired")


def linear_kto(
    x: Float[Array, "*batch time features"],
    kernel: Float[Array, "features vocab"],
    labels: Int[Array, "*batch time"],
    desirable: Bool[Array, "*batch"],
    reference_x: Float[Array, "*batch time reference_features"] | None = None,
    reference_kernel: Float[Array, "reference_features vocab"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    reference_bias: Float[Array, " vocab"] | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    reference_log_probs: Float[Array, "*batch"] | None = None,
    kl: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: Float[Array, "*#batch"] | None = None,
    token_where: Float[Array, "*#batch #time"] | None = None,
    ignore_index: int = -100,
    logit_soft_cap: float | None = None,
    reduction: str = "mean",
    return_rewards: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the loss of Kahneman-Tversky optimisation for sequences of which each was liked or not; no pairs are needed.

    Args:
        x: the policy's hidden states.
        kernel, bias: the policy's head: its logits are `x @ kernel + bias`.
        labels: the token that follows at each place; `ignore_index` where none counts (prompt, padding).
        desirable: whether each sequence was liked.
        reference_x, reference_kernel, reference_bias: the same of the reference model, a constant.
        loss_type: "kto", or "apo_zero_unpaired", which has no z.
        beta: how strongly the policy is held to the reference.
        reference_log_probs: in place of the reference model what it gave to each sequence, the sum over its tokens.
        kl: the mean of log π - log ref over sequences under prompts that are not theirs, which is z where it is positive; a constant.
            `linear_log_prob` gives the log-probabilities.
        desirable_weight, undesirable_weight: multiply the losses of sequences that were liked and of those that were not.
        where: how much each sequence counts, a mask or weights, which multiply its loss.
        token_where: how much each token counts. What does not count, in either or by its label, is not touched.
        ignore_index: a place with this label does not count. A label that is neither this nor in [0, vocab) gives NaN.
        logit_soft_cap: c in c tanh(logits / c), in both models; None for none.
        reduction: "mean" over the sequences, by what they count in `where` (0 where none does), "sum", or "none" for each.
        return_rewards: whether to return beta h of each sequence, as constants.
        block_size: rows in a block; None to choose.

    Returns:
        The loss, a float32 scalar (or wider) or (*batch); with `return_rewards` a tuple of it and the rewards (*batch).

    Raises:
        ValueError: for shapes that do not fit, a value out of its range, a reference that is missing.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_kto"
    given = read_options(who, ignore_index=ignore_index, logit_soft_cap=logit_soft_cap, block_size=block_size)
    options, reduction = Options(**given, reduction="none"), read_options(who, reduction=reduction)["reduction"]
    loss_type = checks.choice(who, "loss_type", loss_type, LOSS_TYPES)
    beta = checks.number(who, "beta", beta, "(0, inf)", traced=True)
    liked, disliked = (
        checks.number(who, what, y, "[0, inf)", traced=True)
        for what, y in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight))
    )
    return_rewards = checks.flag(who, "return_rewards", return_rewards)
    kl = lax.stop_gradient(checks.number(who, "kl", kl, traced=True))
    x, kernel, bias = check_head(who, x, kernel, bias)
    if x.ndim < 2:
        raise ValueError(f"{who}: x has shape {x.shape}, but must be (*batch, time, features)")
    batch = x.shape[:-2]
    desirable = checks.array(who, "desirable", desirable, "boolean")
    checks.shape(who, "desirable", desirable, batch, "(*batch)", x=x)
    weight = None if where is None else check_where(who, where, batch)
    weight = jnp.ones(batch) if weight is None else weight.reshape(batch)
    tokens = read_tokens(who, x, labels, _kept(who, token_where, weight, x.shape[:-1]), kernel.shape[1], options, ("labels", "token_where"))
    reference = tokens.constant(
        who, Model("reference", reference_x, reference_kernel, reference_bias), reference_log_probs, kernel.shape[1], options, of_sequences=True
    )
    if reference is None:
        raise ValueError(f"{who}: reference_x is None, but the loss needs a reference: give reference_x and reference_kernel, or reference_log_probs")

    h = tokens.of_sequences(tokens.under(x, kernel, bias, options)[0]) - reference
    z = jnp.maximum(kl, 0) if loss_type == "kto" else 0
    loss = jnp.where(desirable, liked, disliked) * jax.nn.sigmoid(jnp.where(desirable, -1, 1) * beta * (h - z))
    weight = weight.astype(loss.dtype)
    loss = reduce_weighted(loss, weight, reduction)
    return (loss, lax.stop_gradient(beta * h)) if return_rewards else loss


def _kept(who: str, tokens: Any, weight: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """What each token counts, 0 in sequences that do not."""
    counts = check_where(who, tokens, batch, "token_where", "(*batch, time)")
    kept = jnp.broadcast_to(weight[..., None] != 0, batch)
    return kept if counts is None else jnp.where(kept, counts.reshape(batch), 0)
