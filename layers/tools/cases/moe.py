"""Rows of the benchmark: experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.experts.grouped_matmul import grouped_matmul
from layers.experts.moe import moe
from layers.tools.cases.case import Case, normal

SIZES = jnp.array([317, 0, 128, 515, 64, 700, 1, 323])
"""Rows of eight experts: one has none and one has one."""


def _args() -> tuple[Any, ...]:
    return (*normal((2048, 256), (8, 256, 512)), SIZES)


def _experts() -> tuple[Any, ...]:
    x, up, down, gate, logits = normal((1024, 256), (8, 256, 512), (8, 512, 256), (8, 256, 512), (1024, 8))
    weights, indices = lax.top_k(jax.nn.softmax(logits), 2)
    return x, weights, indices, up / 16, down / 16, gate / 16


def _every_expert(x: Any, weights: Any, indices: Any, up: Any, down: Any, gate: Any) -> Any:
    """What people write without grouped products: every expert for every token."""
    shares = (jax.nn.one_hot(indices, 8) * weights[..., None]).sum(1)
    h = jax.nn.silu(jnp.einsum("ti,eih->teh", x, gate)) * jnp.einsum("ti,eih->teh", x, up)
    return jnp.einsum("teh,eho,te->to", h, down, shares)


def _ragged(x: Any, weights: Any, indices: Any, up: Any, down: Any, gate: Any) -> Any:
    """The same by `lax.ragged_dot`."""
    order = jnp.argsort(indices.reshape(-1))
    sizes, rows = jnp.bincount(indices.reshape(-1), length=8), x[order // 2]
    h = jax.nn.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    y = lax.ragged_dot(h, down, sizes) * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[order // 2].add(y)


CASES = (
    Case(
        "grouped_matmul",
        "grouped product, 2048 x 256 -> 512, 8 uneven groups",
        _args,
        lax.ragged_dot,
        grouped_matmul,
        flops=6.0 * 2048 * 256 * 512,
    ),
    Case(
        "moe",
        "gated experts, 1024 tokens of 256 to 2 of 8 experts of 512",
        _experts,
        _every_expert,
        moe,
        flops=18.0 * 2048 * 256 * 512,
        others=(("ragged_dot", _ragged),),
    ),
)
