"""Odds-ratio preference optimisation on hidden states, without their logits: no reference, and the cross entropy of what was chosen.

    p the geometric mean of the probabilities of a sequence's tokens,   odds = p / (1 - p)
    loss = -β log σ(log odds(chosen) - log odds(rejected)) + the mean cross entropy of the chosen tokens

Log-probabilities and their gradient are those of `linear_log_prob.py`.

Reference: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", 2024; names and defaults as in TRL.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.numerics import safe_reciprocal
from layers.losses.arguments import check_head, read_options
from layers.losses.sequences import read_pairs
from layers.losses.targets import Options, reduce_weighted


def linear_orpo(
    chosen_x: Float[Array, "*batch time features"],
    rejected_x: Float[Array, "*batch other_time features"],
    kernel: Float[Array, "features vocab"],
    chosen_labels: Int[Array, "*batch time"],
    rejected_labels: Int[Array, "*batch other_time"],
    bias: Float[Array, " vocab"] | None = None,
    *,
    beta: float = 0.1,
    where: Float[Array, "*#batch"] | None = None,
    chosen_where: Float[Array, "*#batch #time"] | None = None,
    rejected_where: Float[Array, "*#batch #other_time"] | None = None,
    ignore_index: int = -100,
    logit_soft_cap: float | None = None,
    reduction: str = "mean",
    return_rewards: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the loss of odds-ratio preference optimisation for pairs of sequences.

    Args:
        chosen_x, rejected_x: hidden states for the sequences that were preferred and those that were not.
        kernel, bias: the head: logits are `x @ kernel + bias`.
        chosen_labels, rejected_labels: the token that follows at each place; `ignore_index` where none counts (prompt, padding).
        beta: multiplies the part of the odds; λ in the paper.
        where: how much each pair counts, a mask or weights, which multiply its loss.
        chosen_where, rejected_where: how much each token counts. What does not count, in any of the three or by its label, is not touched.
        ignore_index: a place with this label does not count. A label that is neither this nor in [0, vocab) gives NaN.
        logit_soft_cap: c in c tanh(logits / c), which takes the place of the logits; None for none.
        reduction: "mean" over the pairs, by what they count (0 where none does), "sum", or "none" for each pair; to each the mean cross entropy of
            all chosen tokens is added.
        return_rewards: whether to return beta times the mean log-probabilities of chosen and of rejected sequences, as constants.
        block_size: rows in a block; None to choose.

    Returns:
        The loss, a float32 scalar (or wider) or (*batch); with `return_rewards` a tuple of it and the two rewards, each (*batch).

    Raises:
        ValueError: for shapes that do not fit, a value out of its range. TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_orpo"
    given = read_options(who, ignore_index=ignore_index, logit_soft_cap=logit_soft_cap, block_size=block_size)
    options, reduction = Options(**given, reduction="none"), read_options(who, reduction=reduction)["reduction"]
    beta = checks.number(who, "beta", beta, "[0, inf)", traced=True)
    return_rewards = checks.flag(who, "return_rewards", return_rewards)
    chosen_x, kernel, bias = check_head(who, chosen_x, kernel, bias, ("chosen_x", "kernel", "bias"))
    rejected_x, _, _ = check_head(who, rejected_x, kernel, bias, ("rejected_x", "kernel", "bias"))
    labels, counts = (chosen_labels, rejected_labels), (chosen_where, rejected_where)
    (chosen, rejected), weight = read_pairs(who, (chosen_x, rejected_x), labels, counts, where, kernel.shape[1], options)

    total = chosen.log_probs(chosen_x, kernel, bias, options)
    first, second = chosen.averaged(total, True), rejected.averaged(rejected.log_probs(rejected_x, kernel, bias, options), True)
    loss = -beta * jax.nn.log_sigmoid(_log_odds(first) - _log_odds(second)) - total.sum() * safe_reciprocal(chosen.length().sum())
    loss = reduce_weighted(loss, weight, reduction)
    return (loss, *(lax.stop_gradient(beta * y) for y in (first, second))) if return_rewards else loss


def _log_odds(log_p: jax.Array) -> jax.Array:
    """log p - log(1 - p), finite where p is 1 by rounding."""
    least = jnp.finfo(log_p.dtype).eps ** 2
    log_p = log_p - lax.stop_gradient(jnp.maximum(log_p + least, 0))
    return log_p - jnp.log(-jnp.expm1(log_p))
