"""Gradient reversal.

Forward   y = x
Backward  dx = -scale dy
Saved     scale, if it is an array.

The gradient is on purpose not that of the forward: below this layer, features are trained against the loss above it.

Reference: Ganin & Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.core.trees import map_floating
from layers.function.function import Function


class ReverseGradientFunction(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x

    @staticmethod
    def backward(ctx, dy):
        return -ctx.scale * dy, None

    @staticmethod
    def surrogate(x, scale):
        return -jax.lax.stop_gradient(scale) * x

    @staticmethod
    def example(key, dtype):
        return jax.random.normal(key, (3, 4), dtype), 0.5

    @staticmethod
    def examples(key, dtype):
        x, scale = ReverseGradientFunction.example(key, dtype)
        return {"by 0": (x, 0.0), "infinite": (x.at[0].set(jnp.inf), scale), "far out": (1e4 * x, scale), "empty": (x[:0], scale)}


def reverse_gradient(x: Any, *, scale: float | jax.Array = 1.0) -> Any:
    """Returns `x`; its gradient comes back negated and multiplied by `scale`.

    Args:
        x: an array or pytree of arrays, of any shape; integer leaves go through.
        scale: a number or scalar array, which itself gets no gradient.

    Raises:
        ValueError: if `scale` is not a scalar, or not finite; TypeError: if it is no real number.

    Reference: Ganin & Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015.
    """
    scale = checks.number("reverse_gradient", "scale", scale, traced=True)
    return map_floating("reverse_gradient", lambda leaf: ReverseGradientFunction.apply(leaf, scale), x)
