"""Normalisation of rows to mean 0 and variance 1.

    rstd = (var(x) + epsilon)^-1/2,  x̂ = (x - mean(x)) rstd,  y = scale x̂ + bias

With g = scale dy the cotangent of x̂:

    dx = rstd (g - mean(g) - x̂ mean(g x̂)),  dscale = Σ dy x̂,  dbias = Σ dy

Saved: x, scale and two float32 numbers a row, its mean and rstd. x̂ is recomputed from them, in blocks of rows.

Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.core.function import Function
from layers.core.numerics import safe_rsqrt
from layers.core.recompute import barrier
from layers.norms import statistics
from layers.norms.statistics import ROWS, affine, as_computed


class LayerNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, epsilon, *, mask=None, over=ROWS, dtype=None):
        xw = as_computed(x, dtype)
        mean, var = over.moments(xw, over.weight(xw, mask))
        rstd = safe_rsqrt(var + epsilon)
        ctx.save_for_backward(x, scale, mask, mean, rstd)
        ctx.over, ctx.dtype, ctx.bias = over, dtype, None if bias is None else jax.ShapeDtypeStruct(bias.shape, bias.dtype)
        return affine((xw - mean) * rstd, as_computed(scale, dtype), as_computed(bias, dtype)).astype(dtype or x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, scale, mask, mean, rstd), over, dtype = ctx.saved_tensors, ctx.over, ctx.dtype

        def grads(dy, x, mean, rstd):
            dy, xhat = as_computed(dy, dtype), (as_computed(x, dtype) - mean) * rstd
            g = affine(dy, as_computed(scale, dtype), None)
            dx = rstd * (g - over.weight(xhat, mask) * (over.total(g) + xhat * over.total(g * xhat)))
            return dx.astype(x.dtype), (statistics.sum_to(dy * xhat, scale), statistics.sum_to(dy, ctx.bias))

        if mask is None and over.by_rows() and statistics.has_blocks(x):
            dx, (dscale, dbias) = statistics.in_row_blocks(grads, (dy, x, mean, rstd))
        else:
            (x, mean, rstd), dy = barrier((x, mean, rstd), dy)
            dx, (dscale, dbias) = grads(dy, x, mean, rstd)
        return dx, dscale, dbias, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 5), (5,), (5,))
        x, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, scale, bias, 1e-6


def layer_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*batch features"]:
    """Shifts and scales each row to mean 0 and variance 1.

    Statistics are of float32 or wider; a constant row gives `bias` and finite gradients, with `epsilon=0` too.

    Args:
        x: rows of features.
        scale: multiplies each feature; None for 1.
        bias: is added to each feature; None for 0.
        epsilon: is added to the variance.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: where `scale` or `bias` does not fit the last axis of `x`.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x = jnp.asarray(x)
    scale, bias = (None if p is None else jnp.asarray(p) for p in (scale, bias))
    statistics.check_features("layer_norm", x, scale=scale, bias=bias)
    statistics.check_epsilon("layer_norm", epsilon)
    return LayerNormFunction.apply(x, scale, bias, epsilon)


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm`: the same arguments, parameters and values; backward keeps two numbers a row beyond the input."""

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        x, (scale, bias), dtype = statistics.promoted(self, jnp.asarray(x), self.scale, self.bias)
        scale, bias = (statistics.along(x, self.feature_axes, p) for p in (scale, bias))
        over = statistics.module_over(self, x.ndim, self.reduction_axes)
        return LayerNormFunction.apply(x, scale, bias, self.epsilon, mask=mask, over=over, dtype=dtype)
