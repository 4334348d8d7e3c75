"""A linear unit behind a gate of GELU.

    y = gelu(gate) up
    dgate = dy up gelu'(gate),   dup = dy gelu(gate)

with gelu and gelu' as in `gelu.py`, exact or approximate.

Saved: gate and up, outputs of other layers; the rest is one elementwise pass from them, behind a barrier, so that XLA does not keep it from
the forward pass.

Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import GateFunction, draw_two, pair
from layers.core import checks
from layers.core.elementwise import GELU, GELU_EXACT


class GEGLUFunction(GateFunction):
    activation, example = GELU, staticmethod(draw_two)


class ExactGEGLUFunction(GateFunction):
    activation, example = GELU_EXACT, staticmethod(draw_two)


def geglu(gate: Float[Array, "*shape"], up: Float[Array, "*shape"], approximate: bool = True) -> Float[Array, "*shape"]:
    """Computes `jax.nn.gelu(gate, approximate) * up`.

    In half precision it is computed in float32 and rounded once.

    Args:
        gate: any array.
        up: of the same shape.
        approximate: whether GELU is computed by a hyperbolic tangent, or exactly.

    Returns:
        An array of that shape and the common dtype.

    Raises:
        TypeError: where an argument is not of a real floating-point dtype.
        ValueError: where the shapes differ.
    """
    gate, up = pair("geglu", gate, up)
    return (GEGLUFunction if checks.flag("geglu", "approximate", approximate) else ExactGEGLUFunction).apply(gate, up)
