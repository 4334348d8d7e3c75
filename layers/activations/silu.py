"""The sigmoid linear unit, or swish.

    y = x s,   s = σ(x)
    dx = dy (s + x s (1 - s))

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: Elfwing et al., "Sigmoid-Weighted Linear Units", 2017; Ramachandran et al., "Searching for Activation Functions", 2017.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import UnaryFunction, draw_one
from layers.core import checks
from layers.core.elementwise import SILU


class SiLUFunction(UnaryFunction):
    activation, example = SILU, staticmethod(draw_one)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Multiplies each element by its sigmoid: x σ(x), as `jax.nn.silu`.

    In half precision it is computed in float32 and rounded once; value and gradient have their limits at ±inf.

    Args:
        x: any array.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: where `x` is not of a real floating-point dtype.
    """
    return SiLUFunction.apply(checks.array("silu", "x", x))
