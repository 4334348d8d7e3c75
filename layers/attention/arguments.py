"""What `dot_product_attention` is given, checked and brought into the form that its rule takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.attention.plan import Hidden
from layers.core import checks
from layers.core.numerics import is_known

WHO = "dot_product_attention"


def as_query_key_value(query: Any, key: Any, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (checks.array(WHO, what, x) for what, x in (("query", query), ("key", key), ("value", value)))
    shapes = f"(query: {q.shape}, key: {k.shape}, value: {v.shape})"
    if not q.ndim == k.ndim == v.ndim or q.ndim not in (3, 4):
        raise ValueError(f"{WHO}: query, key and value must all be (batch, time, heads, head_dim), or all without batch {shapes}")
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{WHO}: batch, and the time and heads of key and value, must be equal {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{WHO}: query has head_dim {q.shape[-1]}, but key has {k.shape[-1]} {shapes}")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{WHO}: {q.shape[-2]} heads of query are not a multiple of {k.shape[-2]} of key and value {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{WHO}: query, key and value must be of one floating-point dtype, but are {q.dtype}, {k.dtype}, {v.dtype}: cast them")
    return q, k, v


def bounds_of(is_causal: Any, window: Any, offset: Any, batch: int) -> tuple[int | None, int | None, jax.Array | None]:
    """The bounds of the query's position less the key's, and how far each batch element's are moved where that is an array."""
    left, right = window if isinstance(window, (tuple, list)) and len(window) == 2 else (window, window)
    left, right = (checks.integer(WHO, "local_window_size", n, "[0, inf)", optional=True) for n in (left, right))
    low = None if right is None else -right
    if checks.flag(WHO, "is_causal", is_causal):
        low = 0 if low is None else max(0, low)
    if isinstance(offset, (jax.Array, np.ndarray)):
        offset = _offsets_of(offset, batch)
        return low, left, offset if low is not None or left is not None else None
    offset = checks.integer(WHO, "query_offset", offset)
    return None if low is None else low - offset, None if left is None else left - offset, None


def _offsets_of(offset: Any, batch: int) -> jax.Array:
    offset = checks.array(WHO, "query_offset", offset, "integer")
    if offset.shape not in ((), (batch,)):
        raise ValueError(f"{WHO}: query_offset has shape {offset.shape}, but must be one whole number or (batch,) = ({batch},)")
    return jnp.broadcast_to(offset, (batch,)).astype(jnp.int32)


def hidden_of(
    q: jax.Array, k: jax.Array, mask: Any, query_lengths: Any, key_lengths: Any, segment_ids: Any, offsets: Any, rate: Any, key: Any, spared: Any
) -> Hidden:
    query_segments, key_segments = segments_of(segment_ids, q, k)
    return Hidden(
        mask=mask_of("mask", mask, q, k),
        query_lengths=lengths_of("query_seq_lengths", query_lengths, q.shape[0]),
        key_lengths=lengths_of("key_value_seq_lengths", key_lengths, q.shape[0]),
        query_segments=query_segments,
        key_segments=key_segments,
        offsets=offsets,
        words=words_of(rate, key, spared),
        rate=rate if isinstance(rate, jax.Array) else None,
        spared=mask_of("dropout_mask", spared, q, k),
    )


def mask_of(what: str, x: Any, q: jax.Array, k: jax.Array) -> jax.Array | None:
    x = checks.array(WHO, what, x, "mask", optional=True)
    if x is not None and jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{WHO}: {what} is of dtype {x.dtype}, but must be of bool or integers: {what} != 0 of zeros and ones"
            + ", or give numbers that are added to the scores as bias" * (what == "mask")
        )
    return _plane(what, None if x is None else x != 0, q, k)


def bias_of(x: Any, q: jax.Array, k: jax.Array) -> jax.Array | None:
    return _plane("bias", checks.array(WHO, "bias", x, "real", optional=True), q, k)


def _plane(what: str, x: jax.Array | None, q: jax.Array, k: jax.Array) -> jax.Array | None:
    if x is None:
        return None
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    shape = (1,) * (4 - x.ndim) + x.shape
    if x.ndim == 3 and x.shape[0] == q.shape[0] > 1:
        raise ValueError(
            f"{WHO}: {what} has shape {x.shape}, whose first axis may be batch or heads: {what}[:, None] is "
            f"(batch, 1, time, kv_time), {what}[None] is (1, heads, time, kv_time)"
        )
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"{WHO}: {what} has shape {x.shape}, but must broadcast to (batch, heads, time, kv_time) = {full}")
    return x.reshape(shape)


def lengths_of(what: str, x: Any, batch: int) -> jax.Array | None:
    x = checks.array(WHO, what, x, "integer", optional=True)
    checks.shape(WHO, what, x, (batch,), "(batch,)")
    return x


def segments_of(ids: Any, q: jax.Array, k: jax.Array) -> tuple[Any, Any]:
    if ids is None:
        return None, None
    pair = [checks.array(WHO, "segment_ids", x, "integer") for x in (ids if isinstance(ids, tuple) and len(ids) == 2 else (ids, ids))]
    pair = [x[None] if x.ndim == 1 and q.shape[0] == 1 else x for x in pair]
    for x, like in zip(pair, (q, k), strict=True):
        checks.shape(WHO, "segment_ids", x, like.shape[:2], "(batch, time)", "; give a tuple (query, key) where these differ")
    return pair[0], pair[1]


def sinks_of(sinks: Any, heads: int) -> jax.Array | None:
    sinks = checks.array(WHO, "sinks", sinks, "real", optional=True)
    checks.shape(WHO, "sinks", sinks, (heads,), "(heads,)")
    return sinks


def words_of(rate: Any, key: Any, spared: Any) -> jax.Array | None:
    key = checks.key(WHO, "dropout_key", key, optional=True)
    if key is not None and spared is not None:
        raise ValueError(f"{WHO}: dropout_key and dropout_mask both say which weights are dropped: leave one out")
    if is_known(rate, 0) or spared is not None:
        return None
    if key is None:
        raise ValueError(f"{WHO}: dropout_rate is above 0, so give dropout_key, a key of jax.random, or dropout_mask")
    return jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
