"""The Gaussian error linear unit.

    y = x Φ(x),   dx = dy (Φ(x) + x φ(x))                                              exact; Φ and φ: the normal law's distribution and density
    y = x (1 + t) / 2,   dx = dy ((1 + t) / 2 + x (1 - t²) u' / 2)                      approximate
    t = tanh u,   u = √(2/π) (x + 0.044715 x³),   u' = √(2/π) (1 + 3 · 0.044715 x²)

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import UnaryFunction, draw_one
from layers.core import checks
from layers.core.elementwise import GELU, GELU_EXACT


class GELUFunction(UnaryFunction):
    activation, example = GELU, staticmethod(draw_one)


class ExactGELUFunction(UnaryFunction):
    activation, example = GELU_EXACT, staticmethod(draw_one)


def gelu(x: Float[Array, "*shape"], approximate: bool = True) -> Float[Array, "*shape"]:
    """Multiplies each element by the probability that a standard normal variable is below it, as `jax.nn.gelu`.

    In half precision it is computed in float32 and rounded once; value and gradient have their limits at ±inf.

    Args:
        x: any array.
        approximate: whether that probability is computed by a hyperbolic tangent, or exactly.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        TypeError: where `x` is not of a real floating-point dtype.
    """
    x = checks.array("gelu", "x", x)
    return (GELUFunction if checks.flag("gelu", "approximate", approximate) else ExactGELUFunction).apply(x)
