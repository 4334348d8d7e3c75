"""Logits of a router: a product in float32, whatever tokens and kernel are of.

Forward   a = x K
Backward  dx = da Kᵀ,   dK = xᵀ da

Saved     x and K as they were given: their casts are made again.

Reference: Fedus, Zoph and Shazeer, "Switch Transformers", 2021, for the precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layers.core.numerics import dot, wide
from layers.core.recompute import barrier
from layers.function.function import Function


class RouterFunction(Function):
    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(x, kernel)
        return _product("ti,ie->te", x, kernel)

    @staticmethod
    def backward(ctx, da):
        (x, kernel), da = barrier(ctx.saved_tensors, da)
        dx = _product("te,ie->ti", da, kernel).astype(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, _product("ti,te->ie", x, da).astype(kernel.dtype) if ctx.needs_input_grad[1] else None

    @staticmethod
    def example(key, dtype):
        return tuple(jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key), ((5, 3), (3, 4)), strict=True))

    @staticmethod
    def examples(key, dtype):
        x, kernel = RouterFunction.example(key, dtype)
        return {"far out": (1e4 * x, kernel), "no tokens": (x[:0], kernel)}


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = wide(jnp.promote_types(x.dtype, y.dtype))
    return dot(spec, x.astype(dtype), y.astype(dtype))
