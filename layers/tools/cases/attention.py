"""Rows of the benchmark: attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import layers
from layers.tools.cases.case import Case, normal


def _attention(name: str, length: int, window: int | None = None) -> Case:
    options: dict[str, Any] = {"is_causal": True} | ({} if window is None else {"local_window_size": (window, 0)})
    heads, head_dim = 8, 64
    pairs = length * length / 2 if window is None else length * window
    return Case(
        name,
        f"causal attention, {length} tokens, {heads} heads of {head_dim}" + ("" if window is None else f", window {window}"),
        lambda: _queries_keys_values(length, heads, head_dim),
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options),
        lambda q, k, v: layers.dot_product_attention(q, k, v, **options),
        flops=12.0 * pairs * heads * head_dim,
        peers=(
            *((("torch", _torch_attention),) if window is None else ()),
            ("tokamax", lambda tokamax, q, k, v: tokamax.dot_product_attention(q, k, v, implementation="xla_chunked", **options)),
        ),
    )


def _segments(length: int, lengths: int) -> Case:
    heads, head_dim = 8, 64

    def mask(ids: Any) -> Any:
        return ids[:, None, :, None] == ids[:, None, None, :]

    return Case(
        "attention_segments",
        f"causal attention, {length} tokens of sequences of {lengths} packed, {heads} heads of {head_dim}",
        lambda: (*_queries_keys_values(length, heads, head_dim), jnp.arange(length)[None] // lengths),
        lambda q, k, v, ids: jax.nn.dot_product_attention(q, k, v, mask=mask(ids), is_causal=True),
        lambda q, k, v, ids: layers.dot_product_attention(q, k, v, segment_ids=ids, is_causal=True),
        flops=6.0 * length * lengths * heads * head_dim,
    )


def _torch_attention(torch: Any, q: Any, k: Any, v: Any) -> Any:
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)


def _queries_keys_values(length: int, heads: int, head_dim: int) -> tuple[Any, ...]:
    return tuple(jax.random.normal(k, (1, length, heads, head_dim)) for k in jax.random.split(jax.random.key(0), 3))


def _plain_rotary_embedding(x: Any) -> Any:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin, (a, b) = jnp.cos(angle), jnp.sin(angle), (x[..., :half], x[..., half:])
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


CASES = (
    _attention("attention", 4096),
    _attention("attention_window", 4096, 512),
    _segments(2048, 256),
    Case(
        "rotary_embedding",
        "rotary embedding, 8 x 1024 tokens, 16 heads of 64",
        lambda: normal((8, 1024, 16, 64)),
        _plain_rotary_embedding,
        lambda x: layers.rotary_embedding(x),
    ),
)
