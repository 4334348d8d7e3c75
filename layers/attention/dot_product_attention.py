"""Attention in tiles, in memory linear in the length.

    s = cap tanh(scale q kᵀ / cap) + bias,   lse = log(Σ exp(s) + exp(sink)),   p = exp(s - lse),   out = (m p) v

with m what dropout multiplies by. Forward goes over the tiles of s once, keeping for each query the largest score, the sum of
exp(s - largest) and the sum of exp(s - largest) v, all scaled anew where a larger score comes.

Backward computes the tiles of p again, from lse. With dp = m (dout vᵀ) and delta = Σ p dp = Σ dout out for each query:

    dv = (m p)ᵀ dout,   ds = p (dp - delta + dlse),   dbias = Σ ds,   dsink = -Σ exp(sink - lse) (delta - dlse)
    dq = scale (slope ds) k,   dk = scale (slope ds)ᵀ q,   slope = 1 - tanh²

Forward mode, the same read the other way, with ṡ = slope scale (q̇ kᵀ + q k̇ᵀ) + biaṡ:

    lsė = Σ p ṡ + exp(sink - lse) siṅk,   ouṫ = Σ (m p ṡ) v + Σ (m p) v̇ - lsė out

A query that sees no key has lse = -inf, out = 0 and no gradient.

Saved: q, k, v, bias, sinks, masks (all arguments), out and lse, one number for each query and head.

Reference: Dao, "FlashAttention-2", 2023; Rabe and Staats, "Self-attention does not need O(n²) memory", 2021; sinks: OpenAI, gpt-oss, 2025.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.attention.tiles import Grid, Hidden, Options, Tile, dot, merge_heads
from layers.core.function import Function
from layers.core.numerics import safe_reciprocal, wide
from layers.core.recompute import barrier


class DotProductAttentionFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, hidden, options):
        grid, dtype = Grid.of(q, k, hidden, options), wide(q.dtype)

        def step(carry, tile: Tile):
            largest, total, out = carry
            s, _ = tile.scores(tile.queries(q), tile.keys(k), bias)
            before = tile.queries(largest)
            now = jnp.maximum(before, s.max(-1))
            finite = jnp.where(now == -jnp.inf, 0, now)
            p, fade = jnp.exp(s - finite[..., None]), jnp.exp(before - finite)
            mp = _times(p, tile.multiplier(dtype)).astype(v.dtype)
            total = tile.put(total, merge_heads(tile.queries(total) * fade + p.sum(-1)), 0)
            part = fade[..., None] * tile.queries(out) + dot("bkgqs,bskh->bkgqh", mp, tile.keys(v))
            return tile.put(largest, merge_heads(now), 0), total, tile.put(out, merge_heads(part), 0)

        largest = jnp.full(q.shape[:3], -jnp.inf, dtype) if sinks is None else jnp.broadcast_to(sinks.astype(dtype), q.shape[:3])
        total = jnp.full(q.shape[:3], 0 if sinks is None else 1, dtype)
        largest, total, out = grid.fold(step, (largest, total, jnp.zeros((*q.shape[:3], v.shape[3]), dtype)))
        out = (out * safe_reciprocal(total)[..., None]).astype(q.dtype)
        lse = jnp.where(total > 0, largest + jnp.log(total), -jnp.inf)
        ctx.save_for_backward(q, k, v, bias, sinks, hidden, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        (q, k, v, bias, sinks, hidden, out, lse), (dout, dlse) = barrier(ctx.saved_tensors, (dout, dlse))
        grid, dtype = Grid.of(q, k, hidden, ctx.options), wide(q.dtype)
        delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), -1) - dlse
        wants_bias = bias is not None and ctx.needs_input_grad[3]

        def step(carry, tile: Tile):
            dq, dk, dv, dbias = carry
            qt, kt, doutt = tile.queries(q), tile.keys(k), tile.queries(dout)
            p, slope = _weights(tile, qt, kt, bias, lse)
            multiplier = tile.multiplier(dtype)
            dv = tile.add(dv, dot("bkgqs,bkgqh->bskh", _times(p, multiplier).astype(v.dtype), doutt), 1)
            dp = _times(dot("bkgqh,bskh->bkgqs", doutt, tile.keys(v)), multiplier)
            ds = p * (dp - tile.queries(delta)[..., None])
            if wants_bias:
                dbias = tile.add_to_plane(dbias, ds)
            ds = (slope * ds).astype(q.dtype)
            dq = tile.add(dq, merge_heads(dot("bkgqs,bskh->bkgqh", ds, kt)) * ctx.options.scale, 0)
            dk = tile.add(dk, dot("bkgqs,bkgqh->bskh", ds, qt) * ctx.options.scale, 1)
            return dq, dk, dv, dbias

        start = [jnp.zeros(x.shape, dtype) for x in (q, k, v)]
        dq, dk, dv, dbias = grid.fold(step, (*start, jnp.zeros(bias.shape, dtype) if wants_bias and bias is not None else None))
        dsinks = None if sinks is None else -jnp.sum(_sink_weights(sinks, lse) * delta, (0, 1))
        return dq, dk, dv, dbias, dsinks, None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, dbias, dsinks, _hidden, _options):
        q, k, v, bias, sinks, hidden, out, lse = ctx.saved_tensors
        grid, dtype = Grid.of(q, k, hidden, ctx.options), wide(q.dtype)

        def step(carry, tile: Tile):
            dout, dlse = carry
            qt, kt = tile.queries(q), tile.keys(k)
            p, slope = _weights(tile, qt, kt, bias, lse)
            mp = _times(p, tile.multiplier(dtype))
            ds = slope * (tile.product(tile.queries(dq), kt) + tile.product(qt, tile.keys(dk)))
            if bias is not None:
                ds = ds + tile.plane(dbias)
            part = dot("bkgqs,bskh->bkgqh", mp * ds, tile.keys(v)) + dot("bkgqs,bskh->bkgqh", mp, tile.keys(dv))
            return tile.add(dout, merge_heads(part), 0), tile.add(dlse, merge_heads((p * ds).sum(-1)), 0)

        dout, dlse = grid.fold(step, (jnp.zeros(out.shape, dtype), jnp.zeros(lse.shape, dtype)))
        if sinks is not None:
            dlse = dlse + _sink_weights(sinks, lse) * dsinks.astype(dtype)
        return dout - dlse[..., None] * out, dlse

    @staticmethod
    def example(key, dtype):
        keys = jax.random.split(key, 5)
        shapes = (2, 7, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3), (1, 4, 7, 5), (4,)
        q, k, v, bias, sinks = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
        hidden = Hidden(key_lengths=jnp.array([5, 3]), words=jnp.array([1, 2], jnp.uint32))
        return q, k, v, bias, sinks, hidden, Options(scale=0.5, cap=2.0, low=-1, high=3, rate=0.2, blocks=(4, 2))


def _times(x: jax.Array, multiplier: jax.Array | None) -> jax.Array:
    return x if multiplier is None else x * multiplier


def _weights(tile: Tile, q: jax.Array, k: jax.Array, bias: Any, lse: jax.Array) -> tuple[jax.Array, Any]:
    """The tile of p, and the derivative of its scores by the scaled products."""
    s, slope = tile.scores(q, k, bias)
    lse = tile.queries(lse)
    return jnp.exp(s - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), slope


def _sink_weights(sinks: jax.Array, lse: jax.Array) -> jax.Array:
    return jnp.exp(sinks.astype(lse.dtype) - jnp.where(lse == -jnp.inf, jnp.inf, lse))


def dot_product_attention(
    query: Float[Array, "*batch time heads head_dim"],
    key: Float[Array, "*batch kv_time kv_heads head_dim"],
    value: Float[Array, "*batch kv_time kv_heads value_dim"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " batch"] | None = None,
    key_value_seq_lengths: Int[Array, " batch"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logit_soft_cap: float | None = None,
    segment_ids: Any = None,
    sinks: Float[Array, " heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    broadcast_dropout: bool = False,
    return_logsumexp: bool = False,
) -> Any:
    """Computes softmax(scale query keyᵀ + bias) value for each head, in memory linear in the length.

    `jax.nn.dot_product_attention` with more options. Parts of the score matrix that a causal mask or a window hides are not computed.
    A query that may attend to nothing gives zeros (there: the mean of all values).

    Args:
        query: one batch axis, or none.
        key, value: heads may be fewer by a whole factor: consecutive query heads share one. `value` may have a head_dim of its own.
        bias: is added to the scores; (batch, heads, time, kv_time), each of its own length or 1, or without leading axes.
        mask: True where a query attends to a key; shaped like `bias`.
        scale: multiplies the products; None for 1 / √head_dim.
        is_causal: query t attends to keys 0 ... t.
        query_seq_lengths: queries from there on give zeros.
        key_value_seq_lengths: keys from there on are not attended to.
        local_window_size: (left, right), or one number for both: query t attends to keys t - left ... t + right.
        implementation: "xla" or None for this one; "cudnn" hands on to JAX's, on NVIDIA GPUs.
        return_residual: another name of `return_logsumexp`, as in `jax.nn`.
        logit_soft_cap: scaled products s become cap tanh(s / cap), before `bias` is added.
        segment_ids: integers (batch, time) of packed sequences, or a pair for queries and keys: attention stays within equal ones.
        sinks: one more score for each head, of a key without a value.
        dropout_rate: the probability that a weight is set to zero, in [0, 1); the others are divided by 1 - dropout_rate.
        dropout_key: a key of `jax.random`. The weights dropped are a hash of it and their place, computed again in backward.
        broadcast_dropout: whether all heads and batch elements drop the same weights.
        return_logsumexp: whether to return the logarithm of the sum of exp(score), too.

    Returns:
        An array like `query`, with the last axis of `value`; with `return_logsumexp` also a float32 array of (*batch, time, heads), -inf
        where a query attends to nothing, through which gradients go.

    Raises:
        ValueError: for shapes that do not fit, an unknown implementation, options that cuDNN does not have.
        TypeError: where arrays are of the wrong dtype.
    """
    return_logsumexp = return_logsumexp or return_residual
    if implementation == "cudnn":
        _refuse_for_cudnn(logit_soft_cap=logit_soft_cap, segment_ids=segment_ids, sinks=sinks, dropout_rate=dropout_rate or None)
        extra: dict[str, Any] = {"return_residual": True} if return_logsumexp else {}
        theirs: Any = jax.nn.dot_product_attention
        return theirs(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation="cudnn",
            **extra,
        )
    if implementation not in (None, "xla"):
        raise ValueError(f"dot_product_attention: implementation is {implementation!r}, but must be 'xla', 'cudnn' or None")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check_query_key_value(query, key, value)
    batched = query.ndim == 4
    q, k, v = (x if batched else x[None] for x in (query, key, value))
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    if isinstance(scale, jax.Array):
        q, scale = q * scale.astype(q.dtype), 1.0
    low, high = _bounds(is_causal, local_window_size)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    query_segments, key_segments = _segments(segment_ids, q, k)
    hidden = Hidden(
        mask=_plane("mask", mask, full),
        query_lengths=_lengths("query_seq_lengths", query_seq_lengths, full[0]),
        key_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, full[0]),
        query_segments=query_segments,
        key_segments=key_segments,
        words=_words(dropout_rate, dropout_key),
    )
    options = Options(
        float(scale or 0.0), None if logit_soft_cap is None else float(logit_soft_cap), low, high, float(dropout_rate), broadcast_dropout
    )
    out, lse = DotProductAttentionFunction.apply(q, k, v, _plane("bias", bias, full), _sinks(sinks, full[1]), hidden, options)
    out, lse = (out, lse) if batched else (out[0], lse[0])
    return (out, lse) if return_logsumexp else out


def _check_query_key_value(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"(query: {q.shape}, key: {k.shape}, value: {v.shape})"
    if not q.ndim == k.ndim == v.ndim or q.ndim not in (3, 4):
        raise ValueError(f"dot_product_attention: query, key and value must all be (batch, time, heads, head_dim), or all without batch {shapes}")
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"dot_product_attention: batch, and the time and heads of key and value, must be equal {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"dot_product_attention: query has head_dim {q.shape[-1]}, but key has {k.shape[-1]} {shapes}")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"dot_product_attention: {q.shape[-2]} heads of query are not a multiple of {k.shape[-2]} of key and value {shapes}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(
            f"dot_product_attention: query, key and value must be of one floating-point dtype, but are {q.dtype}, {k.dtype}, {v.dtype}: cast them"
        )


def _bounds(is_causal: bool, window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    left, right = (None, None) if window is None else (window, window) if isinstance(window, int) else window
    low = None if right is None else -int(right)
    if is_causal:
        low = 0 if low is None else max(0, low)
    return low, None if left is None else int(left)


def _plane(name: str, x: Any, full: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(f"dot_product_attention: mask is of dtype {x.dtype}, but must be of bool: give numbers to be added as bias")
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"dot_product_attention: {name} has shape {x.shape}, but must broadcast to (batch, heads, time, kv_time) = {full}")
    return x.reshape(shape)


def _lengths(name: str, x: Any, batch: int) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"dot_product_attention: {name} is of dtype {x.dtype}, but must be of integers")
    if x.shape != (batch,):
        raise ValueError(f"dot_product_attention: {name} has shape {x.shape}, but must be (batch,) = ({batch},)")
    return x


def _segments(ids: Any, q: jax.Array, k: jax.Array) -> tuple[Any, Any]:
    if ids is None:
        return None, None
    pair = [jnp.asarray(x) for x in (ids if isinstance(ids, (tuple, list)) and len(ids) == 2 else (ids, ids))]
    pair = [x[None] if x.ndim == 1 else x for x in pair]
    for x, like in zip(pair, (q, k), strict=True):
        if x.shape not in (like.shape[:2], (1, like.shape[1])):
            raise ValueError(
                f"dot_product_attention: segment_ids of shape {x.shape} do not fit (batch, time) = {like.shape[:2]}; give a pair (query, key)"
            )
    return pair[0], pair[1]


def _sinks(sinks: Any, heads: int) -> jax.Array | None:
    if sinks is not None and jnp.shape(sinks) != (heads,):
        raise ValueError(f"dot_product_attention: sinks have shape {jnp.shape(sinks)}, but must be (heads,) = ({heads},)")
    return None if sinks is None else jnp.asarray(sinks)


def _words(rate: float, key: Any) -> jax.Array | None:
    if not 0 <= rate < 1:
        raise ValueError(f"dot_product_attention: dropout_rate is {rate}, but must lie in [0, 1)")
    if not rate:
        return None
    if key is None:
        raise ValueError("dot_product_attention: dropout_rate is above 0, so give dropout_key, a key of jax.random")
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(key) if typed else jnp.asarray(key)).astype(jnp.uint32).reshape(-1)


def _refuse_for_cudnn(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"dot_product_attention: implementation='cudnn' has no {', '.join(given)}; use implementation='xla'")
