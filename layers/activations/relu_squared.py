"""The square of the rectified linear unit.

    y = max(x, 0)²
    dx = 2 dy max(x, 0)

Saved: x, alive anyway where it is an argument or the output of another layer; the rest is one elementwise pass from it, behind a barrier, so
that XLA does not keep it from the forward pass.

Reference: So et al., "Primer: Searching for Efficient Transformers", 2021.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import UnaryFunction, draw_one
from layers.core import checks
from layers.core.elementwise import RELU_SQUARED


class ReLUSquaredFunction(UnaryFunction):
    activation, example = RELU_SQUARED, staticmethod(draw_one)


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
    return ReLUSquaredFunction.apply(checks.array("relu_squared", "x", x))
