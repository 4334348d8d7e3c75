"""The sign, with the clipped straight-through gradient.

Forward   y = 1 where x >= 0, -1 where x < 0
Backward  dx = dy where |x| <= 1, else 0
Saved     one bit an element, |x| <= 1, packed eight to a byte.

The slope is that of hardtanh: outside [-1, 1] a change of x cannot come back.

Reference: Hubara et al., "Binarized Neural Networks", 2016.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.bits import pack_bits, unpack_bits
from layers.function.function import Function


class BinarizeFunction(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(pack_bits(jnp.abs(x) <= 1))
        return jnp.where(x >= 0, 1, jnp.where(x < 0, -1, x)).astype(x.dtype)  # NaN stays

    @staticmethod
    def backward(ctx, dy):
        (inside,) = ctx.saved_tensors
        return jnp.where(unpack_bits(inside, dy.shape), dy, 0)

    @staticmethod
    def surrogate(x):
        return jnp.clip(x, -1, 1)

    @staticmethod
    def example(key, dtype):
        return (2 * jax.random.normal(key, (3, 5), dtype),)

    @staticmethod
    def examples(key, dtype):
        (x,) = BinarizeFunction.example(key, dtype)
        return {"infinite": (jnp.array([jnp.inf, -jnp.inf, 0], dtype),), "far out": (1e4 * x,), "empty": (x[:0],)}


def binarize(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sign of `x`, 1 at 0 and NaN for NaN; the gradient goes straight through where |x| <= 1 and is 0 elsewhere.

    Keeps one bit an element for the backward pass.

    Raises:
        TypeError: where `x` is not of a floating-point dtype.

    Reference: Hubara et al., "Binarized Neural Networks", 2016.
    """
    x = checks.array("binarize", "x", x)
    return BinarizeFunction.apply(x)
