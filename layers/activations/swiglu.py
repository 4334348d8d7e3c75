"""A linear unit behind a gate of SiLU.

    y = a up,   a = silu(gate) = gate s,   s = σ(gate)
    dgate = dy up silu'(gate) = dy up (s + gate s (1 - s)),   dup = dy a

Saved: gate and up, outputs of other layers; the rest is one elementwise pass from them, behind a barrier, so that XLA does not keep it from
the forward pass.

Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from layers.activations.arguments import GateFunction, draw_two, pair
from layers.core.elementwise import SILU


class SwiGLUFunction(GateFunction):
    activation, example = SILU, staticmethod(draw_two)


def swiglu(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `jax.nn.silu(gate) * up`.

    In half precision it is computed in float32 and rounded once.

    Args:
        gate: any array.
        up: of the same shape.

    Returns:
        An array of that shape and the common dtype.

    Raises:
        TypeError: where an argument is not of a real floating-point dtype.
        ValueError: where the shapes differ.
    """
    return SwiGLUFunction.apply(*pair("swiglu", gate, up))
