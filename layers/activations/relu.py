"""The rectified linear unit.

    y = max(x, 0)
    dx = dy where x > 0, else 0

Saved: where x > 0, one bit an element. x is not kept.

Reference: Nair and Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", 2010.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.bits import pack_bits, unpack_bits
from layers.function.function import Function


class ReLUFunction(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(pack_bits(x > 0))
        return jnp.maximum(x, 0)

    @staticmethod
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        return jnp.where(unpack_bits(packed, dy.shape), dy, 0)

    @staticmethod
    def example(key, dtype):
        return (jax.random.normal(key, (3, 5), dtype),)

    @staticmethod
    def examples(key, dtype):
        (x,) = ReLUFunction.example(key, dtype)
        return {"infinite": (jnp.array([jnp.inf, -jnp.inf, 1e4, -1e4], dtype),), "far out": (1e4 * x,), "empty": (x[:0],)}


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes max(x, 0), as `jax.nn.relu`; the gradient at 0 is 0.

    Args:
        x: any array.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: where `x` is not of a real floating-point dtype.
    """
    return ReLUFunction.apply(checks.array("relu", "x", x))
