"""Attention by cuDNN, on NVIDIA GPUs of compute capability 8.0 and later, in 16 bits.

cuDNN returns out and lse, the logarithm of the sum of exp(score), and computes from them p = exp(s - lse) and ds = p (dp - Σ dout out), dp = dout vᵀ.
The cotangent of lse, which it does not know, enters as two features more, in which q, k and v are 0 and out is 1: there dout is -dlse, rounded, and
what rounding took from that, so that Σ dout out is less by dlse and dp as it was.

What it would get wrong is fenced here: bounds that it cannot have (`refuse`), and queries that see no key, for which it gives no certain value.
NaN or infinity in a key may spread to queries before it, whose weight of it is 0.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import compat
from layers.kernels.attention_call import AttentionCall
from layers.kernels.hidden import cleared, finite_logsumexp
from layers.kernels.place import Place
from layers.kernels.trial import failure_of_attention

Pair = tuple[jax.Array, jax.Array] | None
FEATURES = 8
"""Features come in such groups."""


def refuse(call: AttentionCall, place: Place) -> str | None:
    """Why cuDNN cannot do a call; None where it can."""
    if place.platform != "cuda":
        return f"it runs on NVIDIA GPUs, but this is compiled for {place.platform}"
    if compat.missing_of_cudnn():
        return f"this JAX has no {', no '.join(compat.missing_of_cudnn())}"
    if not call.sized:
        return "a length is symbolic or 0"
    head_dim, most = call.query[3], _most_features(place)
    causal_alone = call.low == 0 or (call.low is None and call.high is None)
    reasons = {
        f"it takes compute capability 8.0 or later, but this is compiled for {place.architecture}": place.capability < (8, 0),
        f"it takes bfloat16 and float16, but query is {call.dtype}": call.dtype not in ("bfloat16", "float16"),
        "its arrays lie along explicit axes of a mesh: use shard_map": call.mesh == "explicit",
        f"head_dim is {head_dim}, but it takes multiples of {FEATURES} up to {most}": bool(head_dim % FEATURES) or head_dim > most,
        f"value has head_dim {call.value[3]}, but it takes that of query, {head_dim}": call.value[3] != head_dim,
        "a window that sees later keys, or whose end is moved, is not one of its masks: is_causal=True with (left, 0) is": not causal_alone,
        "a window of other keys than queries is not defined alike in all its versions": call.high is not None and call.query[1] != call.key[1],
        "a window of no key is not one of its masks": call.high is not None and call.high < 0,
        "keys after the last query are read by it, though none sees them": call.low == 0 and call.key[1] > call.query[1],
        "it has no soft cap": call.cap is not None,
        "its dropout is not a hash of the place, as this layer's is": call.dropout,
        "it would take a mask as a bias of all scores, and give the mean of all values where it hides every key": call.mask,
        "packed sequences take their number, which segment_ids do not say": call.segments,
        "it has no offsets of each batch element": call.offsets,
        f"bias is {call.bias_dtype} and would be rounded to {call.dtype}: cast it": call.bias is not None and call.bias_dtype != call.dtype,
        "with a bias it takes even numbers of queries and keys": call.bias is not None and bool(call.query[1] % 2 or call.key[1] % 2),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _most_features(place: Place) -> int:
    return 256 if place.capability >= (9, 0) else 128


def takes_backward(call: AttentionCall, place: Place, *, wants_bias: bool, has_dlse: bool) -> bool:
    """Whether `backward` has what is wanted: the gradient of a bias that batch elements share and heads do not, with all its queries and keys."""
    whole = (1, call.query[2], call.query[1], call.key[1])
    return (not wants_bias or call.bias == whole) and (not has_dlse or call.query[3] + FEATURES <= _most_features(place))


def forward(
    call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, lengths: Pair, _segments: Pair
) -> tuple[jax.Array, jax.Array]:
    """The output (batch, time, heads, head_dim), and lse (batch, time, heads) in float32: 0 and -inf where a query sees no key.

    Args:
        call: the options.
        q, k, v: (batch, time, heads, head_dim), heads of k and v as many or fewer by a whole factor.
        bias: (batch, heads, time, kv_time), each of its own length or 1.
        lengths: of queries and of keys, (batch,) each.
    """
    out, lse = compat.cudnn_attention_forward(*_counted(q, k, v, lengths), bias, lengths, **_options(call))
    lse, sees = jnp.swapaxes(lse, 1, 2), _sees(call, q, lengths)
    return (out, lse) if sees is None else (cleared(out, sees), jnp.where(sees[..., None], lse, -jnp.inf))


def backward(
    call: AttentionCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    lengths: Pair,
    _segments: Pair,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    *,
    wants_bias: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq, dk, dv and, where it is wanted, dbias, from what `forward` returned and the gradients of that.

    `out` and `lse` may be those with further scores in the sum, such as sinks.
    """
    head_dim, sees = q.shape[3], _sees(call, q, lengths)
    q, k, v = _counted(q, k, v, lengths)
    dout, dlse = cleared(dout, sees), None if dlse is None else cleared(dlse, sees)
    if dlse is not None:
        q, k, v = (_with_features(x) for x in (q, k, v))
        rounded = -dlse.astype(dout.dtype)
        lost = (-dlse - rounded).astype(dout.dtype)
        out, dout = _with_features(out, *[jnp.ones_like(rounded)] * 2), _with_features(dout, rounded, lost)
    lse = jnp.swapaxes(finite_logsumexp(lse), 1, 2)
    dq, dk, dv, *dbias = compat.cudnn_attention_backward(q, k, v, bias, lengths, lse, out, dout, wants_bias=wants_bias, **_options(call))
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim], dbias[0] if dbias else None


def _options(call: AttentionCall) -> dict[str, Any]:
    """A window of it is one of keys: as many as are left of the query, and its own."""
    return {"scale": call.scale, "causal": call.low == 0, "window": None if call.high is None else call.high + 1}


def _with_features(x: jax.Array, *columns: jax.Array) -> jax.Array:
    """`x` with a group of features more: these, then zeros."""
    zeros = jnp.zeros((*x.shape[:3], FEATURES - len(columns)), x.dtype)
    return jnp.concatenate([x, *(c[..., None].astype(x.dtype) for c in columns), zeros], -1)


def _counted(q: jax.Array, k: jax.Array, v: jax.Array, lengths: Pair) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays without what lies beyond the lengths, which may be NaN: cuDNN multiplies it by weights of 0."""
    if lengths is None:
        return q, k, v

    queries, keys = (jnp.arange(x.shape[1]) < n[:, None] for x, n in zip((q, k), lengths, strict=True))
    return cleared(q, queries), cleared(k, keys), cleared(v, keys)


def _sees(call: AttentionCall, q: jax.Array, lengths: Pair) -> jax.Array | None:
    """Whether each query (batch, time) sees a key; None where all do."""
    if lengths is None:
        return None
    place = jnp.arange(q.shape[1])
    first = 0 if call.high is None else jnp.maximum(place - call.high, 0)
    return (place < lengths[0][:, None]) & (first < lengths[1][:, None])


@functools.cache
def fails() -> str | None:
    """Why cuDNN's attention does not compile on this machine, tried once."""
    return failure_of_attention(forward)
