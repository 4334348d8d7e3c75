"""Slices that a loop takes of an array that it does not change."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def slice_here(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """`lax.dynamic_slice_in_dim` in a loop: XLA's CPU compiler would slice a float32 copy of all of a 16-bit `x`, made before the loop."""
    return lax.dynamic_slice_in_dim(lax.optimization_barrier((x, start))[0], start, size, axis)


@slice_here.defjvp
def _slice_here_jvp(size: int, axis: int, primals: Any, tangents: Any) -> Any:
    return slice_here(*primals, size, axis), lax.dynamic_slice_in_dim(tangents[0], primals[1], size, axis)
