"""Mish.

    y = x t,   t = tanh(softplus(x)) = n / (n + 2)  with  w = eˣ, n = w (w + 2)
    dx = dy (t + x t'),   t' = 4 w (w + 1) / (n + 2)²

The quotients take one exponential, and nothing cancels in them as it does in 1 - t².

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import UnaryFunction, draw_one
from layers.core import checks
from layers.core.elementwise import MISH


class MishFunction(UnaryFunction):
    activation, example = MISH, staticmethod(draw_one)


def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Multiplies each element by tanh(softplus(x)), as `jax.nn.mish`.

    In half precision it is computed in float32 and rounded once; value and gradient have their limits at ±inf.

    Args:
        x: any array.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: where `x` is not of a real floating-point dtype.
    """
    return MishFunction.apply(checks.array("mish", "x", x))
