"""Attention in tiles, in memory linear in the length.

    s = cap tanh(scale q kᵀ / cap) + bias,   lse = log(Σ exp(s) + exp(sink)),   p = exp(s - lse),   out = (m p) v

with m what dropout multiplies by. Forward goes over the tiles of s once, keeping for each query the largest score, the sum of
exp(s - largest) and the sum of exp(s - largest) v, all scaled anew where a larger score comes.

Backward computes the tiles of p again, from lse. With dp = m (dout vᵀ) and delta = Σ p dp = Σ dout out for each query:

    dv = (m p)ᵀ dout,   ds = p (dp - delta + dlse),   dbias = Σ ds,   dsink = -Σ exp(sink - lse) (delta - dlse)
    dq = scale (slope ds) k,   dk = scale (slope ds)ᵀ q,   slope = 1 - tanh²

Forward mode, the same read the other way, with ṡ = slope scale (q̇ kᵀ + q k̇ᵀ) + biaṡ:

    lsė = Σ p ṡ + exp(sink - lse) siṅk,   ouṫ = Σ (m p ṡ) v + Σ (m p) v̇ - lsė out

The loop of backward takes the tiles of a block of keys one after the other. In 16 bits dk and dv of the block are added up in a float32 array
of its size, and only dq in one of all queries.

A query that sees no key has lse = -inf, out = 0 and no gradient. What is hidden is not touched (`tile.py`).

Saved: q, k, v, bias, sinks, masks (all arguments), out and lse, one number for each query and head; in 16 bits also what rounding took
from out, which delta needs to be no less exact than autodiff's.

Reference: Dao, "FlashAttention-2", 2023; Rabe and Staats, "Self-attention does not need O(n²) memory", 2021; sinks: OpenAI, gpt-oss, 2025.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.attention import arguments, by_kernel, in_tiles
from layers.attention.heads import merge_heads
from layers.attention.plan import Hidden, Options
from layers.attention.tile import Tile
from layers.attention.tiles import Grid
from layers.attention.weights import exact_output, sink_weights, times, weights_of
from layers.core import checks
from layers.core.compat import zeros
from layers.core.constants import refuse_gradient
from layers.core.numerics import dot, scaled, wide
from layers.core.recompute import barrier
from layers.core.sharding import sharded_as
from layers.function.function import Function
from layers.kernels.attention import KERNELS
from layers.kernels.dispatch import NAMES, choose


class DotProductAttentionFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, hidden, options):
        ctx.set_materialize_grads(False)
        way = in_tiles if options.implementation == "xla" else by_kernel
        out, lost, lse = way.forward(q, k, v, bias, sinks, hidden, options)
        ctx.save_for_backward(q, k, v, bias, sinks, hidden, out, lost, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        refuse_gradient(arguments.WHO, "dropout_rate", ctx.needs_input_grad[5])
        saved, (dout, dlse) = barrier(ctx.saved_tensors, (dout, dlse))
        _, _, _, bias, _, _, out, _, _ = saved
        dout = zeros(jax.typeof(out)) if dout is None else dout
        wants_bias = bias is not None and ctx.needs_input_grad[3]
        way = by_kernel if by_kernel.takes_backward(saved, dlse, ctx.options, wants_bias) else in_tiles
        return *way.backward(saved, dout, dlse, ctx.options, wants_bias), None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, dbias, dsinks, _hidden, _options):
        q, k, v, bias, sinks, hidden, out, lost, lse = ctx.saved_tensors
        refuse_gradient(arguments.WHO, "dropout_rate", ctx.needs_input_grad[5])
        given: Any = zip((dq, dk, dv, dbias, dsinks), (q, k, v, bias, sinks), strict=True)
        dots: Any = tuple(zeros(jax.typeof(x)) if dot is None and x is not None else dot for dot, x in given)
        dq, dk, dv, dbias, dsinks = dots
        grid, dtype = Grid.of(q, k, hidden, ctx.options), wide(q.dtype)

        def step(carry, tile: Tile):
            dout, dlse = carry
            qt, kt = tile.queries(q), tile.keys(k)
            dvt, spoiled = tile.finite_keys(dv)
            p, slope = weights_of(tile, qt, kt, bias, lse, spoiled)
            mp = times(p, tile.multiplier(dtype))
            ds = slope * (tile.product(tile.queries(dq), kt) + tile.product(qt, tile.keys(dk)))
            if bias is not None:
                ds = ds + tile.plane(dbias)
            ds = tile.seen(p, ds)
            part = dot("bkgqs,bskh->bkgqh", mp * ds, tile.finite(tile.keys(v))) + dot("bkgqs,bskh->bkgqh", mp, dvt)
            return tile.add(dout, merge_heads(part), 0), tile.add(dlse, merge_heads((p * ds).sum(-1)), 0)

        dout, dlse = grid.fold(step, (sharded_as(jnp.zeros(out.shape, dtype), q), sharded_as(jnp.zeros(lse.shape, dtype), q)))
        if sinks is not None:
            dlse = dlse + sink_weights(sinks, lse) * dsinks.astype(dtype)
        return dout - dlse[..., None] * exact_output(out, lost, dtype), dlse

    @staticmethod
    def example(key, dtype):
        keys = jax.random.split(key, 5)
        shapes = (2, 7, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3), (1, 4, 7, 5), (4,)
        q, k, v, bias, sinks = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
        hidden = Hidden(key_lengths=jnp.array([5, 3]), words=jnp.array([1, 2], jnp.uint32))
        return q, k, v, bias, sinks, hidden, Options(scale=0.5, cap=2.0, low=-1, high=3, rate=0.2, blocks=(4, 2))

    @staticmethod
    def examples(key, dtype):
        q, k, v, bias, sinks, _, _ = DotProductAttentionFunction.example(key, dtype)
        q, k, v, bias = q[:, :3], k[:, :4], v[:, :4], bias[..., :3, :4]
        plain, causal = Options(), Options(low=0)
        mask = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], bool)[None, None]
        segments = {"query_segments": jnp.array([[0, 0, 1]] * 2), "key_segments": jnp.array([[0, 0, 1, 1]] * 2)}
        return {
            "plain": (q, k, v, None, None, Hidden(), plain),
            "far out": (1e3 * q, k, v, None, None, Hidden(), plain),
            "causal from an offset": (q, k, v, bias, None, Hidden(offsets=jnp.array([1, 0])), causal),
            "a mask that hides all from a query": (q, k, v, None, sinks, Hidden(mask=mask), plain),
            "masked by a bias": (q, k, v, jnp.where(mask, bias, -jnp.inf), None, Hidden(), plain),
            "lengths and segments": (q, k, v, None, None, Hidden(query_lengths=jnp.array([3, 0]), **segments), causal),
            "no tokens": (q[:, :0], k, v, None, None, Hidden(), plain),
            "no keys": (q, k[:, :0], v[:, :0], None, None, Hidden(), plain),
            "dropped by a mask": (q, k, v, None, None, Hidden(spared=mask | (jnp.arange(4) == 0)), Options(rate=0.5)),
            "dropped alike": (q, k, v, None, None, Hidden(words=jnp.array([1, 2], jnp.uint32)), Options(rate=0.5, shared_dropout=True)),
        }


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
    dropout_rate: float | Float[Array, ""] = 0.0,
    dropout_key: Any = None,
    dropout_mask: Bool[Array, "..."] | None = None,
    broadcast_dropout: bool = False,
    return_logsumexp: bool = False,
    query_offset: int | Int[Array, "*#batch"] = 0,
) -> Any:
    """Computes softmax(scale query keyᵀ + bias) value for each head, in memory linear in the length.

    `jax.nn.dot_product_attention` with more options. Parts of the score matrix that a causal mask or a window hides are not computed.
    A query that may attend to nothing gives zeros (there: the mean of all values). What is hidden from a query is not touched: keys and values
    that no query attends to may be NaN.

    Args:
        query: one batch axis, or none.
        key, value: heads may be fewer by a whole factor: consecutive query heads share one. `value` may have a head_dim of its own.
        bias: is added to the scores; (batch, heads, time, kv_time), each of its own length or 1, or without leading axes.
        mask: True where a query attends to a key; shaped like `bias`. Integers are as good: all but 0.
        scale: multiplies the products; None for 1 / √head_dim.
        is_causal: query t attends to keys 0 ... t + `query_offset`.
        query_seq_lengths: queries from there on give zeros.
        key_value_seq_lengths: keys from there on are not attended to.
        local_window_size: (left, right), or one number for both: query t attends to keys t - left ... t + right, all of them
            moved by `query_offset`.
        implementation: None takes the fastest that can do the call and was verified for it on what is compiled for; "xla", "cudnn" (NVIDIA
            GPUs) or "mosaic" (TPUs) that one, with the derivatives of this layer at every order. `layers.implementations` says which and why.
            By a kernel, what is NaN or infinite in a key may spread to queries before it.
        return_residual: another name of `return_logsumexp`, as in `jax.nn`.
        logit_soft_cap: scaled products s become cap tanh(s / cap), before `bias` is added; above 0.
        segment_ids: integers (batch, time) of packed sequences, or a tuple of those of queries and of keys: attention stays within equal ones.
        sinks: one more score for each head, of a key without a value.
        dropout_rate: the probability that a weight is set to zero, in [0, 1); the others are divided by 1 - dropout_rate. May be traced; it has no
            gradient.
        dropout_key: a key of `jax.random`. The weights dropped are a hash of it and their place, computed again in backward.
        dropout_mask: in place of a key: False where a weight is dropped, drawn outside and kept for backward; shaped like `bias`.
        broadcast_dropout: whether all heads and batch elements drop the same weights.
        return_logsumexp: whether to return the logarithm of the sum of exp(score), too.
        query_offset: the place of the first query among the keys, for `is_causal` and `local_window_size`: kv_time - time lets the last query
            see the last key. An integer, or an array of one, or one for each batch element (then all scores are computed).

    Returns:
        An array like `query`, with the last axis of `value`; with `return_logsumexp` also a float32 array of (*batch, time, heads), -inf
        where a query attends to nothing, through which gradients go.

    Raises:
        ValueError: for shapes that do not fit, an unknown implementation or one that cannot do the call, numbers out of their range, several keys.
        TypeError: where arrays are of the wrong dtype, or `dropout_key` is no key.
    """
    who = arguments.WHO
    implementation = checks.choice(who, "implementation", implementation, (None, *NAMES))
    query, key, value = arguments.as_query_key_value(query, key, value)
    q, k, v = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    wants_logsumexp = checks.flag(who, "return_logsumexp", return_logsumexp) or checks.flag(who, "return_residual", return_residual)
    rate = checks.number(who, "dropout_rate", dropout_rate, "[0, 1)", traced=True)
    low, high, offsets = arguments.bounds_of(is_causal, local_window_size, query_offset, q.shape[0])
    hidden = arguments.hidden_of(q, k, mask, query_seq_lengths, key_value_seq_lengths, segment_ids, offsets, rate, dropout_key, dropout_mask)
    bias, sinks = arguments.bias_of(bias, q, k), arguments.sinks_of(sinks, q.shape[2])
    cap = checks.number(who, "logit_soft_cap", logit_soft_cap, "(0, inf)", optional=True)
    scale = checks.number(who, "scale", scale, traced=True, optional=True)
    shared_dropout = checks.flag(who, "broadcast_dropout", broadcast_dropout)
    q, scale = scaled(q, scale)
    options = Options(scale, cap, low, high, 0.0 if hidden.rate is not None else rate, shared_dropout)
    options = replace(options, implementation=choose(who, by_kernel.describe(q, k, v, bias, sinks, hidden, options), KERNELS, implementation))
    out, lse = DotProductAttentionFunction.apply(q, k, v, bias, sinks, hidden, options)
    out, lse = (out, lse) if query.ndim == 4 else (out[0], lse[0])
    return (out, lse) if wants_logsumexp else out
