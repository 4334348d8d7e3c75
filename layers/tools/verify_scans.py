"""Calls of the selective scan on which its kernels are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import layers
from layers.kernels.place import here
from layers.kernels.selective_scan import KERNELS, ScanCall
from layers.tools.verify_kernels import Trial

LAYER = "selective_scan"
SIZE, STATES = (2, 4096, 1024), (16, 8)


def trials() -> Iterator[Trial]:
    """One for each kernel, dtype and number of states that the kernel does not refuse here."""
    for name, kernel in KERNELS.items():
        for dtype in (jnp.bfloat16, jnp.float32):
            for states in STATES:
                call = ScanCall(SIZE, jnp.dtype(dtype).name, states)
                if kernel.refuse(call, here()) is None:
                    rows, entries = (jax.ShapeDtypeStruct((*SIZE[:2], n), dtype) for n in (SIZE[2], states))
                    shapes = rows, rows, jax.ShapeDtypeStruct((SIZE[2], states), dtype), entries, entries
                    yield Trial(LAYER, name, call, shapes, _scan)


def _scan(implementation: str) -> Callable[..., Any]:
    def scan(u: jax.Array, delta: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return layers.selective_scan(u, delta - 3, -jnp.exp(a / 2), b, c, delta_softplus=True, implementation=implementation)

    return scan
