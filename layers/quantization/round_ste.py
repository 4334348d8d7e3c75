"""Rounding with a straight-through gradient.

Forward   y = round(x), ties to even
Backward  dx = dy
Saved     nothing.

Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core import checks
from layers.function.function import Function


class RoundSteFunction(Function):
    @staticmethod
    def forward(ctx, x):
        return jnp.round(x)

    @staticmethod
    def backward(ctx, dy):
        return dy

    @staticmethod
    def surrogate(x):
        return x

    @staticmethod
    def example(key, dtype):
        return (3 * jax.random.normal(key, (3, 4), dtype),)

    @staticmethod
    def examples(key, dtype):
        (x,) = RoundSteFunction.example(key, dtype)
        return {"infinite": (jnp.array([jnp.inf, -jnp.inf, 0], dtype),), "far out": (1e4 * x,), "empty": (x[:0],)}


def round_ste(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds to the nearest integer, ties to even; the gradient goes straight through.

    Raises:
        TypeError: where `x` is not of a floating-point dtype.

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """
    x = checks.array("round_ste", "x", x)
    return RoundSteFunction.apply(x)
