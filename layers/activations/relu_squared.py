"""The square of the rectified linear unit.

    y = max(x, 0)²
    dx = 2 dy max(x, 0)

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: So et al., "Primer: Searching for Efficient Transformers", 2021.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.activations.arguments import check_real
from layers.core.elementwise import RELU_SQUARED, elementwise
from layers.core.function import Function
from layers.core.recompute import barrier


class ReLUSquaredFunction(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return elementwise(RELU_SQUARED.value, x)

    @staticmethod
    def backward(ctx, dy):
        (x,), dy = barrier(ctx.saved_tensors, dy)
        return elementwise(lambda dy, x: RELU_SQUARED.pull(x, dy), dy, x)

    @staticmethod
    def example(key, dtype):
        return (2 * jax.random.normal(key, (3, 5), dtype),)


def relu_squared(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Squares the positive part: max(x, 0)².

    In half precision it is computed in float32 and rounded once; value and gradient have their limits at ±inf.

    Args:
        x: any array.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: where `x` is not of a real floating-point dtype.
    """
    x = jnp.asarray(x)
    check_real("relu_squared", x=x)
    return ReLUSquaredFunction.apply(x)
