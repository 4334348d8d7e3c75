"""Weights in {-1, 0, 1} times a scale, with a straight-through gradient.

    t = threshold mean|x|,   q = sign(x) where |x| > t else 0,   a = the mean of |x| where q is not 0
Forward   y = a q
Backward  dx = dy

mean|x| and a are taken over the whole array, or for each index of `axis`.
Saved     nothing.

Reference: Li & Liu, "Ternary Weight Networks", 2016, equations 5 and 6.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.lengths import divided, power_of_two
from layers.core.numerics import safe_reciprocal, wide
from layers.function.function import Function


class TernarizeFunction(Function):
    @staticmethod
    def forward(ctx, x, threshold, axes):
        size = jnp.abs(x).astype(wide(x.dtype))
        unit = power_of_two(size.max(axes, keepdims=True, initial=0))
        size = divided(size, unit)  # so that the sums are finite
        bound = threshold * size.mean(axes, keepdims=True)
        kept = ~((size <= bound) & (bound < jnp.inf))  # what is not finite shows in all
        scale = jnp.where(kept, size, 0).sum(axes, keepdims=True) * safe_reciprocal(kept.sum(axes, keepdims=True).astype(size.dtype))
        return (jnp.sign(x) * kept * (unit * scale)).astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None

    @staticmethod
    def surrogate(x, threshold, axes):
        return x

    @staticmethod
    def example(key, dtype):
        return jax.random.normal(key, (3, 5), dtype), 0.7, (0,)

    @staticmethod
    def examples(key, dtype):
        x, threshold, axes = TernarizeFunction.example(key, dtype)
        return {
            "all numbers by one scale": (x, threshold, (0, 1)),
            "far out": (1e4 * x, threshold, axes),
            "zeros": (0 * x, threshold, axes),
            "infinite": (x.at[0].set(jnp.inf), threshold, axes),
            "empty": (x[:0], threshold, axes),
        }


def ternarize(x: Float[Array, "*shape"], *, threshold: float | jax.Array = 0.7, axis: int | None = None) -> Float[Array, "*shape"]:
    """Maps every entry to -a, 0 or a, with a the mean size of those that are not 0; the gradient is that of the identity.

    Args:
        x: weights of any shape.
        threshold: entries up to this multiple of the mean absolute value become 0.
        axis: the channel axis, with a scale for each index; None for one scale.

    Raises:
        ValueError: if `threshold` is not a finite number of at least 0, or `axis` is not an axis of `x`.
        TypeError: where `x` is not of a floating-point dtype, or an option not of its type.

    Reference: Li & Liu, "Ternary Weight Networks", 2016.
    """
    x = checks.array("ternarize", "x", x)
    threshold = checks.number("ternarize", "threshold", threshold, "[0, inf)", traced=True)
    axis = checks.axis("ternarize", "axis", axis, x.ndim, optional=True)
    axes = tuple(i for i in range(x.ndim) if i != axis)
    return TernarizeFunction.apply(x, threshold, axes) if x.size else x
