"""Multi-head attention that never holds the matrix of weights.

Projections, cache and options are those of `flax.nnx.MultiHeadAttention`; the attention between them is `dot_product_attention`, with its
derivation and its saved arrays. Where the weights themselves are asked for (`sow_weights`), it is Flax's.

Reference: Vaswani et al., "Attention Is All You Need", 2017.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import rnglib
from flax.nnx.nn import dtypes

from layers.attention.dot_product_attention import dot_product_attention
from layers.core import checks
from layers.core.products import products_are_patched
from layers.kernels.dispatch import NAMES


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention`: the same arguments, parameters, cache and values, in memory linear in the length.

    Dropped weights are a hash of the key and their place: as many as Flax's, but not the same ones. A query whose mask hides every key
    gives zeros. An `attention_fn` other than Flax's own is called as it is.
    With both a `precision` and a `dropout_rate`, attention is Flax's own, which honours the precision there only.

    `implementation`, an argument more and an attribute that may be set, is that of `layers.dot_product_attention`.
    """

    implementation: str | None = None

    @functools.wraps(nnx.MultiHeadAttention.__init__)
    def __init__(self, *args: Any, implementation: str | None = None, **kwargs: Any):
        self.implementation = checks.choice("MultiHeadAttention", "implementation", implementation, (None, *NAMES))
        given = checks.arguments("MultiHeadAttention", super().__init__, args, kwargs)
        for what in ("num_heads", "in_features", "qkv_features", "out_features", "num_kv_heads", "in_kv_features"):
            given[what] = checks.integer(
                "MultiHeadAttention", what, given[what], "[1, 2147483647]", optional=what not in ("num_heads", "in_features")
            )
        given["dropout_rate"] = checks.number("MultiHeadAttention", "dropout_rate", given["dropout_rate"], "[0, 1)")
        for what in ("broadcast_dropout", "use_bias", "normalize_qk", "deterministic", "decode"):
            given[what] = checks.flag("MultiHeadAttention", what, given[what], optional=what in ("deterministic", "decode"))
        checks.dtype("MultiHeadAttention", "dtype", given["dtype"], "inexact")
        checks.dtype("MultiHeadAttention", "param_dtype", given["param_dtype"], "inexact", optional=False)
        features = given["in_features"] if given["qkv_features"] is None else given["qkv_features"]
        for what in ("num_heads", "num_kv_heads"):
            whole = features if what == "num_heads" else given["num_heads"]
            if given[what] is not None and whole % given[what]:
                raise ValueError(
                    f"MultiHeadAttention: {what} is {given[what]}, but must divide {whole}, the {'features' if what == 'num_heads' else 'num_heads'}"
                )
        super().__init__(**given)

    @functools.wraps(nnx.MultiHeadAttention.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        given = checks.arguments("MultiHeadAttention", super().__call__, args, kwargs)
        for what in ("deterministic", "decode", "sow_weights", "is_causal"):
            given[what] = checks.flag("MultiHeadAttention", what, given[what], optional=what in ("deterministic", "decode"))
        if not isinstance(given["rngs"], (rnglib.Rngs, rnglib.RngStream, type(None))):
            raise TypeError(f"MultiHeadAttention: rngs is {checks.shown(given['rngs'])}, but must be random streams or one of them: nnx.Rngs(seed)")
        decoding = bool(self.decode if given["decode"] is None else given["decode"])
        given |= self._arrays(given["inputs_q"], given["inputs_k"], given["inputs_v"], given["mask"], decoding)
        given["is_causal"] &= not decoding  # the cache hides what is to come, and its first key stands for the one query
        return super().__call__(**given)

    def _arrays(self, q: Any, k: Any, v: Any, mask: Any, decoding: bool) -> dict[str, Any]:
        """The arrays of a call, checked against each other and the module."""
        who, found = "MultiHeadAttention", {}
        if k is None and v is not None:
            raise ValueError(f"{who}: inputs_k is None, but inputs_v is not: give inputs_k alone where both are the same")
        for what, x, features in (("inputs_q", q, self.in_features), ("inputs_k", k, self.in_kv_features), ("inputs_v", v, self.in_kv_features)):
            x = found[what] = checks.array(who, what, x, "any", optional=what != "inputs_q")
            if x is not None and (x.ndim < 2 or x.shape[-1] != features):
                raise ValueError(f"{who}: {what} has shape {x.shape}, but must be (*batch, time, features) with {features} features")
        q, k = found["inputs_q"], found["inputs_q"] if found["inputs_k"] is None else found["inputs_k"]
        if k.shape[-1] != self.in_kv_features:
            raise ValueError(f"{who}: inputs_k is None, but inputs_q cannot stand for it: it has {k.shape[-1]} features, not {self.in_kv_features}")
        found["mask"] = mask = checks.array(who, "mask", mask, "mask", optional=True)
        if not _is_own(self.attention_fn):
            return found
        checks.shape(who, "inputs_k", k, (*q.shape[:-2], *k.shape[-2:]), "(*batch, time, features)", inputs_q=q)
        checks.shape(who, "inputs_v", found["inputs_v"], (*k.shape[:-1], self.in_kv_features), "(*batch, time, features)", inputs_k=k)
        full = (*q.shape[:-2], self.num_heads, q.shape[-2], k.shape[-2])
        if mask is not None and not decoding and not _broadcasts(mask.shape, full):  # the keys of a cache are more
            raise ValueError(f"{who}: mask has shape {mask.shape}, but must broadcast to (*batch, num_heads, time, kv_time) = {full}")
        return found

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name != "attention_fn" or value is not nnx.dot_product_attention:
            return value
        return attend if self.implementation is None else functools.partial(attend, implementation=self.implementation)


def _is_own(attention_fn: Any) -> bool:
    return getattr(attention_fn, "func", attention_fn) is attend


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Any = dtypes.promote_dtype,
    is_causal: bool = False,
    implementation: str | None = None,
    **others: Any,
) -> jax.Array:
    """`flax.nnx.dot_product_attention` by `layers.dot_product_attention`: an `attention_fn` for Flax's modules."""
    if module is not None or (precision is not None and dropout_rate > 0) or products_are_patched():
        return nnx.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=module,
            promote_dtype=promote_dtype,
            is_causal=is_causal,
            **others,
        )
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    batch = query.shape[:-3]
    drops = not deterministic and dropout_rate > 0
    out = dot_product_attention(
        *(_one_batch_axis(x, batch) for x in (query, key, value)),
        bias=_one_batch_axis(bias, batch),
        mask=None if mask is None else _one_batch_axis(mask, batch).astype(bool),
        is_causal=is_causal,
        dropout_rate=dropout_rate if drops else 0.0,
        dropout_key=dropout_rng if drops else None,
        broadcast_dropout=broadcast_dropout,
        implementation=implementation,
    )
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _broadcasts(shape: tuple[Any, ...], full: tuple[Any, ...]) -> bool:
    return len(shape) <= len(full) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False))


def _one_batch_axis(x: Any, batch: tuple[int, ...]) -> Any:
    """`x` with its axes before the last three as one; those of a mask may be fewer or 1."""
    if x is None or len(batch) < 2 or x.ndim < 4:
        return x
    lead = x.shape[:-3]
    if math.prod(lead) == 1:
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
