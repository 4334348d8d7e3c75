"""What `dot_product_attention` is given, checked and brought into the form that its rule takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.attention.plan import Hidden
from layers.core.keys import as_key


def check_implementation(implementation: str | None) -> None:
    if implementation not in (None, "xla"):
        raise ValueError(f"dot_product_attention: implementation is {implementation!r}, but must be 'xla', 'cudnn' or None")


def as_query_key_value(*arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (jnp.asarray(x) for x in arrays)
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
    return q, k, v


def bounds_of(is_causal: bool, window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    left, right = (window, window) if window is None or isinstance(window, (int, np.integer)) else window
    if any(n is not None and n < 0 for n in (left, right)):
        raise ValueError(f"dot_product_attention: local_window_size is {window}, but the steps to the left and right must not be negative")
    low = None if right is None else -int(right)
    if is_causal:
        low = 0 if low is None else max(0, low)
    return low, None if left is None else int(left)


def cap_of(cap: float | None) -> float | None:
    if cap is not None and not cap > 0:
        raise ValueError(f"dot_product_attention: logit_soft_cap is {cap}, but must be above 0; None for no cap")
    return None if cap is None else float(cap)


def hidden_of(q: jax.Array, k: jax.Array, mask: Any, query_lengths: Any, key_lengths: Any, segment_ids: Any, rate: float, key: Any) -> Hidden:
    query_segments, key_segments = segments_of(segment_ids, q, k)
    return Hidden(
        mask=plane_of("mask", mask, q, k),
        query_lengths=lengths_of("query_seq_lengths", query_lengths, q.shape[0]),
        key_lengths=lengths_of("key_value_seq_lengths", key_lengths, q.shape[0]),
        query_segments=query_segments,
        key_segments=key_segments,
        words=words_of(rate, key),
    )


def plane_of(name: str, x: Any, q: jax.Array, k: jax.Array) -> jax.Array | None:
    if x is None:
        return None
    x, full = jnp.asarray(x), (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(f"dot_product_attention: mask is of dtype {x.dtype}, but must be of bool: give numbers to be added as bias")
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"dot_product_attention: {name} has shape {x.shape}, but must broadcast to (batch, heads, time, kv_time) = {full}")
    return x.reshape(shape)


def lengths_of(name: str, x: Any, batch: int) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"dot_product_attention: {name} is of dtype {x.dtype}, but must be of integers")
    if x.shape != (batch,):
        raise ValueError(f"dot_product_attention: {name} has shape {x.shape}, but must be (batch,) = ({batch},)")
    return x


def segments_of(ids: Any, q: jax.Array, k: jax.Array) -> tuple[Any, Any]:
    if ids is None:
        return None, None
    pair = [jnp.asarray(x) for x in (ids if isinstance(ids, tuple) and len(ids) == 2 else (ids, ids))]
    pair = [x[None] if x.ndim == 1 else x for x in pair]
    for x, like in zip(pair, (q, k), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"dot_product_attention: segment_ids are of dtype {x.dtype}, but must be integers: cast them")
        if x.shape not in (like.shape[:2], (1, like.shape[1])):
            raise ValueError(
                f"dot_product_attention: segment_ids of shape {x.shape} do not fit (batch, time) = {like.shape[:2]}; give a tuple (query, key)"
            )
    return pair[0], pair[1]


def sinks_of(sinks: Any, heads: int) -> jax.Array | None:
    if sinks is not None and jnp.shape(sinks) != (heads,):
        raise ValueError(f"dot_product_attention: sinks have shape {jnp.shape(sinks)}, but must be (heads,) = ({heads},)")
    return None if sinks is None else jnp.asarray(sinks)


def words_of(rate: float, key: Any) -> jax.Array | None:
    if not 0 <= rate < 1:
        raise ValueError(f"dot_product_attention: dropout_rate is {rate}, but must lie in [0, 1)")
    if not rate:
        return None
    if key is None:
        raise ValueError("dot_product_attention: dropout_rate is above 0, so give dropout_key, a key of jax.random")
    return jax.random.key_data(as_key("dot_product_attention: dropout_key", key)).astype(jnp.uint32).reshape(-1)
