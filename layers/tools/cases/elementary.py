"""Rows of the benchmark: linear, dropout, embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import layers
from layers.tools.cases.case import Case, normal


def _dropout_args() -> tuple[Any, ...]:
    return (*normal((8192, 2048)), jax.random.key(1))


def _plain_dropout(x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


CASES = (
    Case("dropout", "dropout 0.1, 8192 x 2048", _dropout_args, _plain_dropout, lambda x, key: layers.dropout(x, key, rate=0.1)),
    Case(
        "embed",
        "embedding, 32768 tokens of 50000 x 512",
        lambda: (*normal((50000, 512)), jax.random.randint(jax.random.key(1), (32768,), 0, 50000)),
        lambda table, i: jnp.take(table, i, axis=0),
        lambda table, i: layers.embed(i, table),
        peers=(("torch", lambda torch, table, i: torch.nn.functional.embedding(i, table)),),
    ),
    Case(
        "linear",
        "linear, 8192 x 512 -> 2048",
        lambda: (*normal((8192, 512), (512, 2048)), jnp.zeros(2048)),
        lambda x, w, b: x @ w + b,
        lambda x, w, b: layers.linear(x, w, b),
        flops=6.0 * 8192 * 512 * 2048,
        peers=(("torch", lambda torch, x, w, b: x @ w + b),),
    ),
)
