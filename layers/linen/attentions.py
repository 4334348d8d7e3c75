"""Flax's Linen attention, in memory linear in the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen

from layers.attention.multi_head_attention import attend


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    implementation: str | None = None,
) -> Any:
    """`flax.linen.dot_product_attention`, by `layers.dot_product_attention`: the same arguments and values.

    The softmax is of float32 or wider. Dropped weights are a hash of the key and their place: as many as Flax's, but not the same ones. Where
    weights are sown (`module`) or an einsum is given, it is Flax's. `implementation` is that of `layers.dot_product_attention`; a module takes it as
    `attention_fn=functools.partial(dot_product_attention, implementation="xla")`.
    """
    own = (module, einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
    options: dict[str, Any] = {
        "broadcast_dropout": broadcast_dropout,
        "dropout_rng": dropout_rng,
        "dropout_rate": dropout_rate,
        "deterministic": deterministic,
        "dtype": dtype,
        "precision": precision,
    }
    if any(o is not None for o in own) or precision is not None:
        return linen.dot_product_attention(query, key, value, bias, mask, **options, module=module, **_einsums(force_fp32_for_softmax, *own[1:]))
    return attend(query, key, value, bias, mask, **options, implementation=implementation)


def _einsums(force_fp32_for_softmax: bool, *einsums: Any) -> dict[str, Any]:
    names = ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum")
    return {"force_fp32_for_softmax": force_fp32_for_softmax, **dict(zip(names, einsums, strict=True))}


class MultiHeadDotProductAttention(linen.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention`: the same arguments, parameters, cache and values, in memory linear in the length."""

    attention_fn: Callable[..., Any] = dot_product_attention


class MultiHeadAttention(linen.MultiHeadAttention):
    """`flax.linen.MultiHeadAttention`: the same arguments, parameters, cache and values, in memory linear in the length."""

    attention_fn: Callable[..., Any] = dot_product_attention


class SelfAttention(linen.SelfAttention):
    """`flax.linen.SelfAttention`: the same arguments, parameters, cache and values, in memory linear in the length."""

    attention_fn: Callable[..., Any] = dot_product_attention
