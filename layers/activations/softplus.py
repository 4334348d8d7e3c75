"""Softplus, the smooth rectifier.

    y = log(1 + eˣ)
    dx = dy σ(x)

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: Dugas et al., "Incorporating Second-Order Functional Knowledge", 2000.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import UnaryFunction, draw_one
from layers.core import checks
from layers.core.elementwise import SOFTPLUS


class SoftplusFunction(UnaryFunction):
    activation, example = SOFTPLUS, staticmethod(draw_one)


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
    return SoftplusFunction.apply(checks.array("softplus", "x", x))
