"""A linear unit behind a gate of SiLU.

    y = a up,   a = silu(gate) = gate s,   s = σ(gate)
    dgate = dy up silu'(gate) = dy up (s + gate s (1 - s)),   dup = dy a

Saved: gate and up, outputs of other layers; the rest is one elementwise pass from them, behind a barrier, so that XLA does not keep it from
the forward pass.

Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.activations.arguments import check_real
from layers.core.elementwise import SILU, elementwise
from layers.core.function import Function
from layers.core.recompute import barrier


class SwiGLUFunction(Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return elementwise(lambda gate, up: SILU.value(gate) * up, gate, up)

    @staticmethod
    def backward(ctx, dy):
        (gate, up), dy = barrier(ctx.saved_tensors, dy)
        return elementwise(lambda dy, gate, up: (SILU.pull(gate, dy * up), dy * SILU.value(gate)), dy, gate, up)

    @staticmethod
    def example(key, dtype):
        return tuple(jax.random.normal(k, (3, 5), dtype) for k in jax.random.split(key))


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
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    check_real("swiglu", gate=gate, up=up)
    return SwiGLUFunction.apply(gate, up)
