"""Direct preference optimisation on the hidden states of a policy and a reference model, without their logits.

    margin = β ((log π(chosen) - log π(rejected)) - (log ref(chosen) - log ref(rejected)))
    loss   = -(1 - s) log σ(margin) - s log σ(-margin)

with the log-probability of a sequence the sum over those of its tokens, each from `linear_cross_entropy`, which computes the gradient. The
reference gets none.

Reference: Rafailov et al., "Direct Preference Optimization", 2023; s: Mitchell, "A note on DPO with noisy preferences", 2023.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from layers.losses.arguments import check_reduction
from layers.losses.linear_cross_entropy import linear_cross_entropy


def linear_dpo(
    chosen_x: Float[Array, "*batch time features"],
    rejected_x: Float[Array, "*batch other_time features"],
    kernel: Float[Array, "features vocab"],
    chosen_labels: Int[Array, "*batch time"],
    rejected_labels: Int[Array, "*batch other_time"],
    reference_chosen_x: Float[Array, "*batch time reference_features"],
    reference_rejected_x: Float[Array, "*batch other_time reference_features"],
    reference_kernel: Float[Array, "reference_features vocab"],
    bias: Float[Array, " vocab"] | None = None,
    reference_bias: Float[Array, " vocab"] | None = None,
    *,
    beta: float = 0.1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_soft_cap: float | None = None,
    reduction: str = "mean",
    return_rewards: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the loss of direct preference optimisation for pairs of sequences.

    Args:
        chosen_x, rejected_x: the policy's hidden states for the sequences that were preferred and those that were not.
        kernel, bias: the policy's head: its logits are `x @ kernel + bias`.
        chosen_labels, rejected_labels: the token that follows at each place; `ignore_index` where none counts (prompt, padding).
        reference_chosen_x, reference_rejected_x, reference_kernel, reference_bias: the same of the reference model, a constant.
        beta: how strongly the policy is held to the reference; multiplies the margin.
        ignore_index: a place with this label does not count. A label that is neither this nor in [0, vocab) gives NaN.
        label_smoothing: the probability, in [0, 0.5), that a preference is the wrong way round.
        logit_soft_cap: c in c tanh(logits / c), in both models; None for none.
        reduction: "mean" over the pairs (0 where there are none), "sum", or "none" for each pair.
        return_rewards: whether to return beta (log π - log ref) of the chosen and of the rejected sequences, as constants.
        block_size: rows in a block; None to choose.

    Returns:
        The loss, a float32 scalar (or wider) or (*batch); with `return_rewards` a tuple of it and the two rewards, each (*batch).

    Raises:
        ValueError: for shapes that do not fit, an unknown reduction, a value out of its range.
        TypeError: where arrays are of the wrong dtype.
    """
    check_reduction("linear_dpo", reduction)
    if jnp.shape(kernel)[-1:] != jnp.shape(reference_kernel)[-1:]:
        raise ValueError(
            f"linear_dpo: kernel has shape {jnp.shape(kernel)}, but reference_kernel {jnp.shape(reference_kernel)}: both need the same vocab"
        )
    if not beta > 0:
        raise ValueError(f"linear_dpo: beta is {beta}, but must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"linear_dpo: label_smoothing is {label_smoothing}, but must lie in [0, 0.5)")

    def log_ratio(which: str, x: Any, labels: Any, reference_x: Any) -> jax.Array:
        """log π - log ref of each sequence."""
        if not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
            raise TypeError(f"linear_dpo: {which}_labels are of dtype {jnp.asarray(labels).dtype}, but must be integers")
        if jnp.ndim(x) < 2:
            raise ValueError(f"linear_dpo: {which}_x has shape {jnp.shape(x)}, but must be (*batch, time, features)")
        of_tokens = [
            linear_cross_entropy(*a, ignore_index=ignore_index, logit_soft_cap=logit_soft_cap, reduction="none", block_size=block_size)
            for a in ((x, kernel, labels, bias), lax.stop_gradient((reference_x, reference_kernel, labels, reference_bias)))
        ]
        return (of_tokens[1] - of_tokens[0]).sum(-1)

    chosen = log_ratio("chosen", chosen_x, chosen_labels, reference_chosen_x)
    rejected = log_ratio("rejected", rejected_x, rejected_labels, reference_rejected_x)
    if chosen.shape != rejected.shape:
        raise ValueError(f"linear_dpo: chosen sequences have batch {chosen.shape}, but rejected ones {rejected.shape}: give one of each for a pair")
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    if reduction != "none":
        loss = loss.sum() / (max(loss.size, 1) if reduction == "mean" else 1)
    return (loss, lax.stop_gradient(beta * chosen), lax.stop_gradient(beta * rejected)) if return_rewards else loss
