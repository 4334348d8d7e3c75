"""Direct preference optimisation, and what came of it, on hidden states of a policy and of a reference model, without their logits.

    h = (log π(chosen) - log ref(chosen)) - (log π(rejected) - log ref(rejected)),   loss of h: `preference.py`

with the log-probability of a sequence the sum or mean over those of its tokens, each from `linear_log_prob.py`, whose rule has the gradient. The
reference gets none. CPO and SimPO have no reference; CPO adds the cross entropy of the chosen tokens.

Reference: Rafailov et al., "Direct Preference Optimization", 2023; Mitchell, "A note on DPO with noisy preferences", 2023 (smoothing); Azar et al.,
2023 (ipo); Zhao et al., 2023 (hinge); Chowdhury et al., 2024 (robust); Meng et al., 2024 (simpo); Xu et al., 2024 (cpo); names as in TRL.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.numerics import is_known, safe_reciprocal
from layers.losses.arguments import check_head, read_options
from layers.losses.preference import AVERAGED, LOSS_TYPES, SMOOTHED, Preference
from layers.losses.sequences import Reference, read_pairs
from layers.losses.targets import Options, reduce_weighted


def linear_dpo(
    chosen_x: Float[Array, "*batch time features"],
    rejected_x: Float[Array, "*batch other_time features"],
    kernel: Float[Array, "features vocab"],
    chosen_labels: Int[Array, "*batch time"],
    rejected_labels: Int[Array, "*batch other_time"],
    reference_chosen_x: Float[Array, "*batch time reference_features"] | None = None,
    reference_rejected_x: Float[Array, "*batch other_time reference_features"] | None = None,
    reference_kernel: Float[Array, "reference_features vocab"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    reference_bias: Float[Array, " vocab"] | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    reference_chosen_log_probs: Float[Array, "*batch"] | None = None,
    reference_rejected_log_probs: Float[Array, "*batch"] | None = None,
    average_log_prob: bool | None = None,
    simpo_gamma: float = 0.5,
    cpo_alpha: float | None = None,
    where: Float[Array, "*#batch"] | None = None,
    chosen_where: Float[Array, "*#batch #time"] | None = None,
    rejected_where: Float[Array, "*#batch #other_time"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_soft_cap: float | None = None,
    reduction: str = "mean",
    return_rewards: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the loss of direct preference optimisation, or of a variant, for pairs of sequences.

    Args:
        chosen_x, rejected_x: the policy's hidden states for the sequences that were preferred and those that were not.
        kernel, bias: the policy's head: its logits are `x @ kernel + bias`.
        chosen_labels, rejected_labels: the token that follows at each place; `ignore_index` where none counts (prompt, padding).
        reference_chosen_x, reference_rejected_x, reference_kernel, reference_bias: the same of the reference model, a constant.
        loss_type: "sigmoid" (DPO), "ipo", "hinge", "robust", or without a reference "simpo", "cpo".
        beta: how strongly the policy is held to the reference; multiplies the margin. For ipo its τ.
        reference_chosen_log_probs, reference_rejected_log_probs: in place of the reference model what it gave to each sequence, computed before:
            sums over tokens, or means where `average_log_prob`.
        average_log_prob: whether the log-probability of a sequence is the mean over its tokens; None for ipo and simpo only.
        simpo_gamma: the margin that simpo asks for.
        cpo_alpha: is multiplied by the mean cross entropy of all chosen tokens and added to each loss; None for 1 with cpo, else 0.
        where: how much each pair counts, a mask or weights, which multiply its loss.
        chosen_where, rejected_where: how much each token counts. What does not count, in any of the three or by its label, is not touched.
        ignore_index: a place with this label does not count. A label that is neither this nor in [0, vocab) gives NaN.
        label_smoothing: the probability, in [0, 0.5), that a preference is the wrong way round; not for ipo and hinge.
        logit_soft_cap: c in c tanh(logits / c), in both models; None for none.
        reduction: "mean" over the pairs, by what they count (0 where none does), "sum", or "none" for each pair.
        return_rewards: whether to return beta (log π - log ref) of the chosen and of the rejected sequences, as constants.
        block_size: rows in a block; None to choose.

    Returns:
        The loss, a float32 scalar (or wider) or (*batch); with `return_rewards` a tuple of it and the two rewards, each (*batch).

    Raises:
        ValueError: for shapes that do not fit, a value out of its range, a reference that is missing or has no place in the loss.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_dpo"
    given = read_options(who, ignore_index=ignore_index, logit_soft_cap=logit_soft_cap, block_size=block_size)
    options, reduction = Options(**given, reduction="none"), read_options(who, reduction=reduction)["reduction"]
    preference = Preference(
        checks.choice(who, "loss_type", loss_type, LOSS_TYPES),
        checks.number(who, "beta", beta, "(0, inf)", traced=True),
        checks.number(who, "label_smoothing", label_smoothing, "[0, 0.5)", traced=True),
        checks.number(who, "simpo_gamma", simpo_gamma, traced=True),
    )
    if not is_known(preference.smoothing, 0) and loss_type not in SMOOTHED:
        raise ValueError(f"{who}: label_smoothing is {label_smoothing}, but must be 0 with loss_type={loss_type!r}, which has none")
    average, alpha = (
        checks.flag(who, "average_log_prob", average_log_prob, optional=True),
        checks.number(who, "cpo_alpha", cpo_alpha, "[0, inf)", traced=True, optional=True),
    )
    average, alpha = loss_type in AVERAGED if average is None else average, float(loss_type == "cpo") if alpha is None else alpha
    return_rewards = checks.flag(who, "return_rewards", return_rewards)
    chosen_x, kernel, bias = check_head(who, chosen_x, kernel, bias, ("chosen_x", "kernel", "bias"))
    rejected_x, _, _ = check_head(who, rejected_x, kernel, bias, ("rejected_x", "kernel", "bias"))
    labels, counts = (chosen_labels, rejected_labels), (chosen_where, rejected_where)
    (chosen, rejected), weight = read_pairs(who, (chosen_x, rejected_x), labels, counts, where, kernel.shape[1], options)
    reference = Reference(
        (reference_chosen_x, reference_rejected_x), reference_kernel, reference_bias, (reference_chosen_log_probs, reference_rejected_log_probs)
    )
    of_reference = reference.log_probs(who, loss_type, (chosen, rejected), weight, kernel.shape[1], options, average)

    total = chosen.log_probs(chosen_x, kernel, bias, options)
    ratio = chosen.averaged(total, average) - of_reference[0]
    other = rejected.averaged(rejected.log_probs(rejected_x, kernel, bias, options), average) - of_reference[1]
    loss = preference.losses(ratio - other)
    if not is_known(alpha, 0):
        loss = loss - alpha * total.sum() * safe_reciprocal(chosen.length().sum())
    loss = reduce_weighted(loss, weight, reduction)
    return (loss, *(lax.stop_gradient(preference.beta * r) for r in (ratio, other))) if return_rewards else loss
