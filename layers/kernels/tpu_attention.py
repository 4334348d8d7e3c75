"""Attention by JAX's own flash attention kernels for TPUs, which Mosaic compiles, in bfloat16.

The kernels take a query's largest score and its sum of exp(score - largest), and Σ dout out, as they are given: with lse and 1 in place of the first
two, and dlse taken from the third, they compute the gradients of both outputs. Lengths are segments of their own. Key heads are repeated for the
query heads that share them, and what no query sees is cleared, since the kernels add a large negative number to its score.
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
ROWS = 128
"""Queries and keys come in blocks of multiples of this number."""
BLOCKS = (512, 256, ROWS)


def refuse(call: AttentionCall, place: Place) -> str | None:
    """Why the kernels cannot do a call; None where they can."""
    if place.platform != "tpu":
        return f"it runs on TPUs, but this is compiled for {place.platform}"
    if not call.sized:
        return "a length is symbolic or 0"
    (batch, queries, heads, head_dim), keys = call.query, call.key[1]
    reasons = {
        f"it takes bfloat16, but query is {call.dtype}": call.dtype != "bfloat16",
        "its arrays may lie on several devices: use shard_map": bool(call.mesh),
        "it does not say along which axes of a mesh its results vary: use shard_map(check_vma=False)": call.varies,
        f"it takes multiples of {ROWS} queries and keys, but these are {queries} and {keys}": bool(queries % ROWS or keys % ROWS),
        f"head_dim is {head_dim}, but it takes 64, and multiples of 128": bool(head_dim % 128) and head_dim != 64,
        f"value has head_dim {call.value[3]}, but it takes that of query, {head_dim}": call.value[3] != head_dim,
        "a window is not one of its masks": call.high is not None,
        "a causal mask that is moved is not one of its masks": call.low not in (None, 0),
        "keys after the last query are read by it, though none sees them": call.low == 0 and keys > queries,
        "with a bias its scale must not be 0": call.bias is not None and call.scale == 0,
        "it has no soft cap": call.cap is not None,
        "it has no dropout": call.dropout,
        "it has no mask": call.mask,
        "it has no offsets of each batch element": call.offsets,
        f"bias has shape {call.bias}, but it takes one of all batch elements and heads": call.bias not in (None, (batch, heads, queries, keys)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def takes_backward(call: AttentionCall, place: Place, *, wants_bias: bool, has_dlse: bool) -> bool:
    """Whether `backward` has what is wanted: it has all."""
    return True


def forward(
    call: AttentionCall, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, lengths: Pair, segments: Pair
) -> tuple[jax.Array, jax.Array]:
    """The output (batch, time, heads, head_dim), and lse (batch, time, heads) in float32: 0 and -inf where a query sees no key.

    Args:
        call: the options.
        q, k, v: (batch, time, heads, head_dim), heads of k and v as many or fewer by a whole factor.
        bias: (batch, heads, time, kv_time).
        lengths: of queries and of keys, (batch,) each.
        segments: of queries and of keys, (batch, time) each.
    """
    sees, seen, ids = _visible(call, q, k, lengths, segments)
    heads = _by_head(q, cleared(k, seen), cleared(v, seen))
    out, total, largest = compat.tpu_flash_attention(*heads, _unscaled(call, bias), ids, causal=call.low == 0, scale=call.scale, blocks=_blocks(q, k))
    out, lse = jnp.swapaxes(out, 1, 2), jnp.swapaxes(largest + jnp.log(total), 1, 2)
    return cleared(out, sees), lse if sees is None else jnp.where(sees[..., None], lse, -jnp.inf)


def backward(
    call: AttentionCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    lengths: Pair,
    segments: Pair,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    *,
    wants_bias: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq, dk, dv and, where it is wanted, dbias, from what `forward` returned and the gradients of that."""
    sees, seen, ids = _visible(call, q, k, lengths, segments)
    dout = cleared(dout, sees)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1) - (0 if dlse is None else cleared(dlse, sees))
    lse, delta, dout = (jnp.swapaxes(x, 1, 2) for x in (finite_logsumexp(lse), delta, dout))
    heads, options = _by_head(cleared(q, sees), cleared(k, seen), cleared(v, seen)), {"scale": call.scale, "blocks": _blocks(q, k)}
    dq, dk, dv, dbias = compat.tpu_flash_attention_backward(
        *heads, _unscaled(call, bias), ids, jnp.ones_like(lse), lse, dout, delta, causal=call.low == 0, **options
    )
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))
    dk, dv = (x.reshape(*k.shape[:3], -1, k.shape[3]).astype(jnp.float32).sum(3).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv, _unscaled(call, dbias).astype(bias.dtype) if wants_bias and bias is not None else None


def _unscaled(call: AttentionCall, bias: Any) -> Any:
    """The bias divided by the scale: the kernels multiply it by that with the products, and its gradient too."""
    return None if bias is None else bias.astype(jnp.float32) / call.scale


def _by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch, heads, time, head_dim), key heads as many as query heads."""
    q, k, v = (jnp.swapaxes(jnp.repeat(x, q.shape[2] // x.shape[2], 2), 1, 2) for x in (q, k, v))
    return q, k, v


def _blocks(q: jax.Array, k: jax.Array) -> tuple[int, int]:
    """The sizes of the blocks of queries and of keys."""
    queries, keys = (next(b for b in BLOCKS if x.shape[1] % b == 0) for x in (q, k))
    return queries, keys


def _visible(call: AttentionCall, q: jax.Array, k: jax.Array, lengths: Pair, segments: Pair) -> tuple[Any, Any, Pair]:
    """Which queries see a key, which keys a query sees, and the segments with those beyond the lengths apart; None where there are none."""
    if lengths is None and segments is None:
        return None, None, None
    pair = segments or tuple(jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    seen = pair[0][:, :, None] == pair[1][:, None]
    seen = seen & (rows >= columns) if call.low == 0 else seen
    if lengths is not None:
        seen = seen & (rows < lengths[0][:, None, None]) & (columns < lengths[1][:, None, None])
    ids = _apart(pair, lengths)
    return seen.any(2), seen.any(1), ids


def _apart(pair: Any, lengths: Pair) -> Any:
    """Segments as 32-bit integers, of which the two least stand for the queries and the keys beyond the lengths."""
    least = jnp.iinfo(jnp.int32).min
    pair = tuple(jnp.maximum(x, least + 2).astype(jnp.int32) for x in pair)
    if lengths is None:
        return pair
    return tuple(jnp.where(jnp.arange(x.shape[1]) < n[:, None], x, least + i) for i, (x, n) in enumerate(zip(pair, lengths, strict=True)))


@functools.cache
def fails() -> str | None:
    """Why the kernels do not compile on this machine, tried once."""
    return failure_of_attention(forward)
