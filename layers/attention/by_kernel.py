"""Attention's rule by a kernel, with the derivatives of the rule by XLA.

A kernel computes out and lse, and from them the gradients of q, k, v and bias. It does not know sinks: they enter after it,

    out_sink = out w,   lse_sink = lse - log w,   w = 1 / (1 + exp(sink - lse))

and what its backward pass computes from lse_sink, p = exp(s - lse_sink), are the weights beside a sink.

In the names of `dot_product_attention.py`, which has the derivation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.attention import in_tiles
from layers.attention.plan import Hidden, Options
from layers.attention.weights import sink_weights
from layers.core.compat import varies
from layers.core.numerics import product
from layers.core.sharding import mesh_of
from layers.core.stand_in import merging_batches, stand_in
from layers.kernels.attention import KERNELS, AttentionCall
from layers.kernels.place import here


def describe(q: Any, k: Any, v: Any, bias: Any, sinks: Any, hidden: Hidden, options: Options) -> AttentionCall:
    """What a kernel is told of a call."""
    return AttentionCall(
        q.shape,
        k.shape,
        v.shape,
        str(q.dtype),
        options.scale,
        options.low,
        options.high,
        bias=None if bias is None else bias.shape,
        bias_dtype="" if bias is None else str(bias.dtype),
        lengths=hidden.query_lengths is not None or hidden.key_lengths is not None,
        mask=hidden.mask is not None,
        segments=hidden.query_segments is not None,
        offsets=hidden.offsets is not None,
        sinks=sinks is not None,
        dropout=hidden.drops,
        cap=options.cap,
        varies=varies((q, k, v)),
        mesh=mesh_of(q, k, v),
    )


def _describe_saved(saved: tuple[Any, ...], options: Options) -> AttentionCall:
    q, k, v, bias, sinks, hidden, *_ = saved
    return describe(q, k, v, bias, sinks, hidden, options)


def forward(q: Any, k: Any, v: Any, bias: Any, sinks: Any, hidden: Hidden, options: Options) -> tuple[jax.Array, None, jax.Array]:
    """out, None, and lse: what `in_tiles.forward` gives."""
    kernel, call = KERNELS[options.implementation], describe(q, k, v, bias, sinks, hidden, options)

    def by_xla(q: Any, k: Any, v: Any, bias: Any, lengths: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        out, _, lse = in_tiles.forward(q, k, v, bias, None, _hidden(lengths, segments), options)
        return out, lse

    out, lse = _stand_in(lambda *arrays: kernel.forward(call, *arrays), by_xla, (q, k, v, bias, *_counts(q, k, hidden)), bias)
    return (out, None, lse) if sinks is None else _with_sinks(out, lse, sinks)


def _with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    both = jnp.logaddexp(lse, sinks.astype(lse.dtype))
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - jnp.where(jnp.isfinite(both), both, jnp.inf)))
    return (out * weight[..., None]).astype(out.dtype), None, both


def takes_backward(saved: tuple[Any, ...], dlse: Any, options: Options, wants_bias: bool) -> bool:
    """Whether the gradients are a kernel's."""
    if options.implementation == "xla":
        return False
    call = _describe_saved(saved, options)
    return KERNELS[options.implementation].takes_backward(call, here(), wants_bias=wants_bias, has_dlse=dlse is not None)


def backward(saved: tuple[Any, ...], dout: jax.Array, dlse: jax.Array | None, options: Options, wants_bias: bool) -> tuple[Any, ...]:
    """dq, dk, dv, dbias and dsinks: what `in_tiles.backward` gives."""
    q, k, v, bias, sinks, hidden, out, _, lse = saved
    kernel, call = KERNELS[options.implementation], _describe_saved(saved, options)

    def by_xla(q: Any, k: Any, v: Any, bias: Any, lengths: Any, segments: Any, out: Any, lse: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        given = q, k, v, bias, None, _hidden(lengths, segments), out, None, lse
        grads = in_tiles.backward(given, dout, dlse, options, wants_bias)[:4]
        return tuple(None if g is None else g.astype(x.dtype) for g, x in zip(grads, (q, k, v, bias), strict=True))

    arrays = (q, k, v, bias, *_counts(q, k, hidden), out, lse, dout, dlse)
    grads = _stand_in(lambda *arrays: kernel.backward(call, *arrays, wants_bias=wants_bias), by_xla, arrays, bias)
    if sinks is None:
        return *grads, None
    delta = jnp.sum(product(out.astype(lse.dtype), dout.astype(lse.dtype)), -1)
    return *grads, -jnp.sum(sink_weights(sinks, lse) * (delta if dlse is None else delta - dlse), (0, 1))


def _stand_in(kernel: Any, by_xla: Any, arrays: tuple[Any, ...], bias: Any) -> Any:
    """A bias may have no batch of its own, so that batches of it are XLA's."""
    return stand_in(kernel, by_xla, arrays, None if bias is not None else merging_batches(kernel, by_xla))


def _counts(q: jax.Array, k: jax.Array, hidden: Hidden) -> tuple[Any, Any]:
    """The lengths of queries and keys, and their segments: pairs, or None."""
    lengths, segments = (hidden.query_lengths, hidden.key_lengths), (hidden.query_segments, hidden.key_segments)
    if lengths != (None, None):
        lengths = tuple(jnp.full(q.shape[0], x.shape[1], jnp.int32) if n is None else n for n, x in zip(lengths, (q, k), strict=True))
    return None if lengths == (None, None) else lengths, None if segments[0] is None else segments


def _hidden(lengths: Any, segments: Any) -> Hidden:
    query_lengths, key_lengths = lengths or (None, None)
    query_segments, key_segments = segments or (None, None)
    return Hidden(query_lengths=query_lengths, key_lengths=key_lengths, query_segments=query_segments, key_segments=key_segments)
