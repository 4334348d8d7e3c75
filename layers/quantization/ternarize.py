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

from layers.core.checks import check_floating
from layers.core.function import Function
from layers.core.numerics import safe_reciprocal, wide


class TernarizeFunction(Function):
    @staticmethod
    def forward(ctx, x, threshold, axes):
        size = jnp.abs(x).astype(wide(x.dtype))
        kept = size > threshold * size.mean(axes, keepdims=True)
        scale = jnp.where(kept, size, 0).sum(axes, keepdims=True) * safe_reciprocal(kept.sum(axes, keepdims=True).astype(size.dtype))
        return (jnp.sign(x) * kept * scale).astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None

    @staticmethod
    def surrogate(x, threshold, axes):
        return x

    @staticmethod
    def example(key, dtype):
        return jax.random.normal(key, (3, 5), dtype), 0.7, (0,)


def ternarize(x: Float[Array, "*shape"], *, threshold: float = 0.7, axis: int | None = None) -> Float[Array, "*shape"]:
    """Maps every entry to -a, 0 or a; the gradient goes straight through.

    Args:
        x: weights of any shape.
        threshold: entries up to this multiple of the mean absolute value become 0.
        axis: the channel axis, with a scale for each index; None for one scale.

    Raises:
        ValueError: if `threshold` is negative or `axis` is not an axis of `x`.
        TypeError: where `x` is not of a floating-point dtype.

    Reference: Li & Liu, "Ternary Weight Networks", 2016.
    """
    x = jnp.asarray(x)
    check_floating("ternarize", x=x)
    if threshold < 0:
        raise ValueError(f"ternarize: threshold is {threshold}, but must not be negative")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"ternarize: axis is {axis}, but x has shape {x.shape}")
    axes = tuple(i for i in range(x.ndim) if axis is None or i != axis % x.ndim)
    return TernarizeFunction.apply(x, threshold, axes) if x.size else x
