"""Rows of the benchmark: experts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from layers.moe.grouped_matmul import grouped_matmul
from layers.tools.cases.case import Case, normal

SIZES = jnp.array([317, 0, 128, 515, 64, 700, 1, 323])
"""Rows of eight experts: one has none and one has one."""


def _args() -> tuple[Any, ...]:
    return (*normal((2048, 256), (8, 256, 512)), SIZES)


CASES = (
    Case(
        "grouped_matmul",
        "grouped product, 2048 x 256 -> 512, 8 uneven groups",
        _args,
        lax.ragged_dot,
        grouped_matmul,
        flops=6.0 * 2048 * 256 * 512,
    ),
)
