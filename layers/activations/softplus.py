"""Softplus, the smooth rectifier.

    y = log(1 + eˣ)
    dx = dy σ(x)

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: Dugas et al., "Incorporating Second-Order Functional Knowledge", 2000.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.activations.arguments import check_real
from layers.core.elementwise import SOFTPLUS, elementwise
from layers.core.function import Function
from layers.core.recompute import barrier


class SoftplusFunction(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return elementwise(SOFTPLUS.value, x)

    @staticmethod
    def backward(ctx, dy):
        (x,), dy = barrier(ctx.saved_tensors, dy)
        return elementwise(lambda dy, x: SOFTPLUS.pull(x, dy), dy, x)

    @staticmethod
    def example(key, dtype):
        return (2 * jax.random.normal(key, (3, 5), dtype),)


def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes log(1 + eˣ), as `jax.nn.softplus`.

    In half precision it is computed in float32 and rounded once; value and gradient have their limits at ±inf.

    Args:
        x: any array.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: where `x` is not of a real floating-point dtype.
    """
    x = jnp.asarray(x)
    check_real("softplus", x=x)
    return SoftplusFunction.apply(x)
