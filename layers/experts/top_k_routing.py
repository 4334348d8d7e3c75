"""To which experts each token goes, and with which weights.

    s = softmax(logits) or σ(logits), float32;   i = the k experts of largest s + bias;   w = s_i, or s_i / Σ s_i where they are normalised
    p = s, for σ s / Σ s;   f_e = the share of the T k choices that fell on e
Forward   w, i;   balance = E Σ_e f_e mean_t p_te,   z = mean_t lse_t²,   lse = log Σ exp(logits)
Backward  ds_i = dw_i, or (dw_i - Σ_j dw_j w_j) / Σ s_i;     dp_e = dbalance E f_e / T;     softmax: dlogits = s (ds + dp - Σ s (ds + dp)),
          σ: dlogits = (ds + (dp - Σ p dp) / Σ s) s (1 - s);     and of z: dlogits += dz 2 lse softmax(logits) / T

The bias only chooses, it has no gradient: it balances experts without a loss. What is chosen has none either. A token that is padding, and a choice
beyond the capacity of its expert, first come first served, has i = E, which is no expert, and w = 0; w is normalised before that.
Saved     logits and what was chosen.

Reference: Fedus, Zoph and Shazeer, "Switch Transformers", 2021, for balance and capacity; Zoph et al., "ST-MoE", 2022, for z; Wang et al.,
"Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024, for the bias; DeepSeek-AI, "DeepSeek-V3", 2024, for σ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from layers.core import checks
from layers.core.numerics import safe_reciprocal, wide
from layers.core.rows import as_rows
from layers.function.function import Function

SCORES = ("softmax", "sigmoid")


class Routing(NamedTuple):
    """Which experts each token goes to and how much each counts, from `top_k_routing`; with what a balanced router is trained by.

    Attributes:
        indices: (*batch, k), int32, the experts; their number for a choice that is none.
        weights: (*batch, k), of the dtype of the logits, float32 at least.
        counts: (experts,), int32, the tokens of each expert.
        balance_loss: 1 where all experts are chosen evenly; larger the less they are.
        z_loss: keeps logits small.
    """

    indices: jax.Array
    weights: jax.Array
    counts: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array


class TopKRoutingFunction(Function):
    @staticmethod
    def forward(ctx, logits, bias, mask, k, scores, normalize, capacity):
        logits = _kept(logits.astype(wide(logits.dtype)), mask)
        s, _, lse = _scores(logits, scores)
        chosen = lax.top_k(s if bias is None else s + bias, k)[1]
        chosen = chosen if mask is None else jnp.where(mask[:, None], chosen, s.shape[1])
        ctx.save_for_backward(logits, chosen, mask)
        ctx.scores, ctx.normalize, ctx.capacity = scores, normalize, capacity
        indices = _within_capacity(chosen, s.shape[1], capacity)
        weights = jnp.where(indices < s.shape[1], _weights(s, chosen, normalize), 0)
        return weights, indices, counts_of(indices, s.shape[1]), *_losses(s, lse, chosen, mask, scores)

    @staticmethod
    def backward(ctx, dw, _indices, _counts, dbalance, dz):
        logits, chosen, mask = ctx.saved_tensors
        s, total, lse = _scores(logits, ctx.scores)
        tokens, dw = _tokens(mask, s), jnp.where(_within_capacity(chosen, s.shape[1], ctx.capacity) < s.shape[1], dw, 0)
        if ctx.normalize:
            w = _weights(s, chosen, True)
            dw = (dw - (dw * w).sum(-1, keepdims=True)) * safe_reciprocal(_chosen(s, chosen).sum(-1, keepdims=True))
        dp = dbalance * s.shape[1] * _shares(chosen, s) / tokens
        ds = _spread(dw, chosen, s.shape[1])
        if ctx.scores == "softmax":
            ds = ds + dp
            dlogits = s * (ds - (s * ds).sum(-1, keepdims=True))
        else:
            one = safe_reciprocal(total)
            dlogits = (ds + (dp - (s * dp).sum(-1, keepdims=True) * one) * one) * s * (1 - s)
        dlogits = dlogits + dz * 2 / tokens * lse * jnp.exp(logits - lse)
        return _kept(dlogits, mask), *[None] * 6

    @staticmethod
    def surrogate(logits, bias, mask, k, scores, normalize, capacity):
        s = jax.nn.softmax(logits) if scores == "softmax" else jax.nn.sigmoid(logits)
        kept = jnp.ones(len(logits)) if mask is None else mask.astype(s.dtype)
        tokens = jnp.maximum(kept.sum(), 1)
        chosen = jnp.argsort(-(s if bias is None else s + bias), stable=True)[:, :k]
        w = jnp.take_along_axis(s, chosen, 1)
        w = w / w.sum(-1, keepdims=True) if normalize else w
        here = jax.nn.one_hot(chosen, s.shape[1]) * kept[:, None, None]
        if capacity is not None:  # of each expert the first choices of all tokens come first
            before = jnp.cumsum(here.swapaxes(0, 1).reshape(-1, s.shape[1]), 0).reshape(k, *s.shape).swapaxes(0, 1)
            w = jnp.where((before * here).sum(-1) <= capacity, w, 0)
        p, shares = s / s.sum(-1, keepdims=True), here.sum((0, 1)) / (tokens * k)
        balance = s.shape[1] * (shares * p * kept[:, None] / tokens).sum()
        return w * kept[:, None], balance, (kept * jax.nn.logsumexp(logits, -1) ** 2).sum() / tokens

    @staticmethod
    def example(key, dtype):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (7, 5), dtype), jax.random.normal(second, (5,), jnp.float32) / 9, None, 2, "sigmoid", True, None

    @staticmethod
    def examples(key, dtype):
        logits, bias, _, k, *_ = TopKRoutingFunction.example(key, dtype)
        mask = jnp.array([1, 0, 1, 1, 0, 1, 1], bool)
        return {
            "softmax": (logits, None, None, k, "softmax", False, None),
            "far out": (1e4 * logits, None, None, k, "softmax", False, None),
            "masked": (logits, bias, mask, k, "softmax", True, None),
            "nothing but padding": (logits, bias, mask & False, k, "softmax", True, None),
            "within a capacity": (logits, bias, None, k, "sigmoid", False, 2),
            "no tokens": (logits[:0], bias, None, k, "sigmoid", True, None),
        }


def _kept(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else jnp.where(mask[:, None], x, 0)


def _tokens(mask: jax.Array | None, s: jax.Array) -> Any:
    """How many there are, at least 1."""
    return max(s.shape[0], 1) if mask is None else jnp.maximum(mask.sum(dtype=s.dtype), 1)


def _scores(logits: jax.Array, scores: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """s, Σ s and lse."""
    lse = jax.nn.logsumexp(logits, -1, keepdims=True)
    s = jnp.exp(logits - lse) if scores == "softmax" else lax.logistic(logits)
    return s, s.sum(-1, keepdims=True), lse


def _losses(s: jax.Array, lse: jax.Array, indices: jax.Array, mask: jax.Array | None, scores: str) -> tuple[jax.Array, jax.Array]:
    p = _kept(s if scores == "softmax" else s * safe_reciprocal(s.sum(-1, keepdims=True)), mask)
    tokens = _tokens(mask, s)
    return s.shape[1] * (_shares(indices, s) * p.sum(0)).sum() / tokens, _kept(jnp.square(lse), mask).sum() / tokens


def _chosen(s: jax.Array, indices: jax.Array) -> jax.Array:
    """s at the indices, 0 where these are no expert."""
    return jnp.where(indices < s.shape[1], jnp.take_along_axis(s, jnp.minimum(indices, s.shape[1] - 1), 1), 0)


def _weights(s: jax.Array, indices: jax.Array, normalize: bool) -> jax.Array:
    w = _chosen(s, indices)
    return w * safe_reciprocal(w.sum(-1, keepdims=True)) if normalize else w


def _spread(dw: jax.Array, indices: jax.Array, experts: int) -> jax.Array:
    """(tokens, experts): each entry of dw at its expert."""
    return (dw[..., None] * (indices[..., None] == jnp.arange(experts))).sum(1)


def counts_of(indices: jax.Array, experts: int) -> jax.Array:
    """How often each expert is chosen."""
    return (indices.reshape(-1, 1) == jnp.arange(experts)).sum(0, dtype=jnp.int32)


def _shares(indices: jax.Array, s: jax.Array) -> jax.Array:
    counts = counts_of(indices, s.shape[1]).astype(s.dtype)
    return counts / jnp.maximum(counts.sum(), 1)


def _within_capacity(indices: jax.Array, experts: int, capacity: int | None) -> jax.Array:
    """The indices, without those that come after `capacity` others of their expert: first the first choices of all tokens, in their order."""
    if capacity is None:
        return indices.astype(jnp.int32)
    flat = indices.T.reshape(-1)
    before = jnp.cumsum(flat[:, None] == jnp.arange(experts), 0) - 1
    place = jnp.take_along_axis(before, jnp.minimum(flat, experts - 1)[:, None], 1)[:, 0]
    return jnp.where(place < capacity, flat, experts).reshape(indices.T.shape).T.astype(jnp.int32)


def top_k_routing(
    logits: Float[Array, "*batch experts"],
    k: int,
    *,
    scores: str = "softmax",
    bias: Float[Array, " experts"] | None = None,
    normalize: bool = True,
    capacity: int | None = None,
    mask: Bool[Array, "*batch"] | None = None,
) -> Routing:
    """Chooses k experts for each token, with weights that are differentiable in the logits.

    Args:
        logits: of the router; computed with in float32 or wider.
        k: experts of a token.
        scores: "softmax" over the experts, or "sigmoid" of each.
        bias: is added to the scores for the choice only, and gets no gradient.
        normalize: makes the weights of a token sum to 1.
        capacity: the most tokens of an expert; choices beyond it are dropped, second choices before first ones. None drops nothing.
        mask: True for tokens, False for padding, which goes nowhere and counts for nothing, whatever its logits are.

    Returns:
        A `Routing`.

    Raises:
        ValueError: where shapes do not fit, or an option is out of range. TypeError: where `logits` is not of a floating-point dtype.

    Reference: Fedus, Zoph and Shazeer, "Switch Transformers", 2021; Zoph et al., "ST-MoE", 2022; DeepSeek-AI, "DeepSeek-V3", 2024.
    """
    return route("top_k_routing", logits, k, scores, bias, normalize, capacity, mask)


def route(who: str, logits: Any, k: Any, scores: Any, bias: Any, normalize: Any, capacity: Any, mask: Any) -> Routing:
    """`top_k_routing`, for the function and for the modules."""
    logits = checks.array(who, "logits", logits)
    if logits.ndim < 1 or not logits.shape[-1]:
        raise ValueError(f"{who}: logits has shape {logits.shape}, but must be (*batch, experts) with an expert at least")
    k = checks.integer(who, "k", k, f"[1, {logits.shape[-1]}]")
    checks.choice(who, "scores", scores, SCORES)
    bias = checks.array(who, "bias", bias, optional=True)
    checks.shape(who, "bias", bias, logits.shape[-1:], "(experts,)", logits=logits)
    normalize = checks.flag(who, "normalize", normalize)
    capacity = checks.integer(who, "capacity", capacity, "[0, 2147483647]", optional=True)
    mask = checks.array(who, "mask", mask, "mask", optional=True)
    checks.shape(who, "mask", mask, logits.shape[:-1], "(*batch,)", logits=logits)
    bias = None if bias is None else lax.stop_gradient(bias)
    flat = None if mask is None else as_rows(mask[..., None] != 0)[:, 0]
    weights, indices, counts, *losses = TopKRoutingFunction.apply(as_rows(logits), bias, flat, k, scores, normalize, capacity)
    batch = logits.shape[:-1]
    return Routing(indices.reshape(*batch, k), weights.reshape(*batch, k), counts, *losses)
