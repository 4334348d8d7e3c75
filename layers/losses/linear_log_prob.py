"""Log-probabilities of tokens under a linear head, without its logits: `linear_cross_entropy` of each row, the other way up.

    log_prob = log p[id],   p = softmax(cap(x kernel + bias) / temperature)

Saved: the arguments, and two float32 numbers a row, with the entropy three; backward computes the logits again.

Reference: `rows.py`; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from layers.core.rows import as_rows
from layers.losses.arguments import as_batch, check_head, check_ids, read_options
from layers.losses.linear_cross_entropy import LinearCrossEntropyFunction
from layers.losses.targets import Labels, Options


def linear_log_prob(
    x: Float[Array, "*batch features"],
    kernel: Float[Array, "features vocab"],
    ids: Int[Array, "*batch"],
    bias: Float[Array, " vocab"] | None = None,
    *,
    temperature: float = 1.0,
    logit_soft_cap: float | None = None,
    ignore_index: int = -100,
    return_logsumexp: bool = False,
    return_entropy: bool = False,
    return_rank: bool = False,
    block_size: int | None = None,
) -> Any:
    """Computes the log-probability of each token under the logits `x @ kernel + bias` without ever holding them whole.

    What losses of reinforcement learning and preference learning are made of; all but the rank is differentiable.

    Args:
        x: rows of features.
        kernel: as that of `flax.nnx.Linear`.
        ids: the token of each row.
        bias: is added to the logits.
        temperature: divides the logits, after the cap; above 0.
        logit_soft_cap: c in c tanh(logits / c), which takes the place of the logits; None for none.
        ignore_index: a row with this id is not touched, its log-probability is 0. An id that is neither this nor in [0, vocab) gives NaN.
        return_logsumexp: whether to return the logsumexp of each row's logits over the temperature.
        return_entropy: whether to return the entropy of each row's softmax.
        return_rank: whether to return how many tokens are more probable than that of the row, -1 where it is ignored; an integer.
        block_size: rows in a block; None to choose, as in `linear_cross_entropy`.

    Returns:
        The log-probabilities (*batch), float32 or wider; with `return_logsumexp`, `return_entropy` and `return_rank` a tuple of them and these,
        (*batch) each, in this order.

    Raises:
        ValueError: for shapes that do not fit, a value out of its range.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_log_prob"
    options = read_options(
        who,
        temperature=temperature,
        logit_soft_cap=logit_soft_cap,
        ignore_index=ignore_index,
        return_logsumexp=return_logsumexp,
        return_entropy=return_entropy,
        return_rank=return_rank,
        block_size=block_size,
    )
    x, kernel, bias = check_head(who, x, kernel, bias)
    batch = x.shape[:-1]
    labels = Labels(as_rows(check_ids(who, "ids", ids, batch), batch))
    return as_batch(log_probs(as_rows(x, batch), kernel, bias, labels, Options(**options, reduction="none")), batch)


def log_probs(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, labels: Labels, options: Options) -> tuple[Any, ...]:
    """The log-probabilities of rows, times what they count, and what else `options` ask for."""
    loss, *others = LinearCrossEntropyFunction.apply(x, kernel, bias, labels, options)
    return -loss, *others
