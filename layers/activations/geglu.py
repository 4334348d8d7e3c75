"""A linear unit behind a gate of GELU.

    y = gelu(gate) up
    dgate = dy up gelu'(gate),   dup = dy gelu(gate)

with gelu and gelu' as in `gelu.py`, exact or approximate.

Saved: gate and up, outputs of other layers; the rest is one elementwise pass from them, behind a barrier, so that XLA does not keep it from
the forward pass.

Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.activations.arguments import check_real
from layers.core.elementwise import GELU, GELU_EXACT, elementwise
from layers.core.function import Function
from layers.core.recompute import barrier


class GEGLUFunction(Function):
    @staticmethod
    def forward(ctx, gate, up, approximate):
        ctx.save_for_backward(gate, up)
        ctx.activation = GELU if approximate else GELU_EXACT
        return elementwise(lambda gate, up: ctx.activation.value(gate) * up, gate, up)

    @staticmethod
    def backward(ctx, dy):
        (gate, up), dy = barrier(ctx.saved_tensors, dy)
        value, pull = ctx.activation
        return *elementwise(lambda dy, gate, up: (pull(gate, dy * up), dy * value(gate)), dy, gate, up), None

    @staticmethod
    def example(key, dtype):
        return *(jax.random.normal(k, (3, 5), dtype) for k in jax.random.split(key)), False


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
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    check_real("geglu", gate=gate, up=up)
    return GEGLUFunction.apply(gate, up, approximate)
