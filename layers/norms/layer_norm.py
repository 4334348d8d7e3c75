"""Normalisation of rows to mean 0 and variance 1.

    root = (var(x) + epsilon)^1/2,  x̂ = (x - mean(x)) / root,  y = scale x̂ + bias

With g = scale dy the cotangent of x̂:

    dx = (g - mean(g) - x̂ mean(g x̂)) / root,  dscale = Σ dy x̂,  dbias = Σ dy

Saved: x, scale and two float32 numbers a row, its mean and root. x̂ is recomputed from them, in blocks of rows.

Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.core.constants import refuse_gradient
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.norms import arguments, statistics
from layers.norms.statistics import ROWS, Over, affine, as_computed, by_root, standardized, weighted


class LayerNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, epsilon, mask=None, over=ROWS, dtype=None):
        xw = as_computed(x, dtype)
        mean, _, root = over.moments(xw, over.weight(xw, mask), epsilon)
        ctx.save_for_backward(x, scale, mask, mean, root)
        ctx.over, ctx.dtype, ctx.bias = over, dtype, None if bias is None else jax.ShapeDtypeStruct(bias.shape, bias.dtype)
        return affine(standardized(xw, mean, root, mask), as_computed(scale, dtype), as_computed(bias, dtype)).astype(dtype or x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, scale, mask, mean, root), over, dtype = ctx.saved_tensors, ctx.over, ctx.dtype
        refuse_gradient("layer_norm", "epsilon", ctx.needs_input_grad[3])

        def grads(dy, x, mean, root):
            dy, xhat = as_computed(dy, dtype), standardized(as_computed(x, dtype), mean, root, mask)
            g = affine(dy, as_computed(scale, dtype), None)
            dx = by_root(g - weighted(over.total(g) + xhat * over.total(g * xhat), over.weight(xhat, mask)), root)
            return dx.astype(x.dtype), (statistics.sum_to(dy * xhat, scale), statistics.sum_to(dy, ctx.bias))

        if mask is None and over.by_rows() and statistics.has_blocks(x):
            dx, (dscale, dbias) = statistics.in_row_blocks(grads, (dy, x, mean, root))
        else:
            (x, mean, root), dy = barrier((x, mean, root), dy)
            dx, (dscale, dbias) = grads(dy, x, mean, root)
        return dx, dscale, dbias, None, None, None, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 5), (5,), (5,))
        x, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, scale, bias, 1e-6

    @staticmethod
    def examples(key, dtype):
        x, scale, bias, epsilon = LayerNormFunction.example(key, dtype)
        mask = jnp.arange(30).reshape(x.shape) % 4 > 0
        return {
            "no scale": (x, None, bias, epsilon),
            "no bias": (x, scale, None, epsilon),
            "equal numbers in a row": (jnp.ones_like(x), scale, bias, epsilon),
            "far out": (1e4 * x, scale, bias, epsilon),
            "masked, over other axes, computed in float64": (x, scale, bias, epsilon, mask, Over((-2, -1), fast=True), jnp.float64),
            "no rows": (x[:0], scale, bias, epsilon),
        }


def layer_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-6,
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
        ValueError: where `scale` or `bias` does not fit the last axis of `x`, or `epsilon` is negative.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x, scale, bias, epsilon = arguments.rows("layer_norm", x, epsilon, scale=scale, bias=bias)
    return LayerNormFunction.apply(x, scale, bias, epsilon)


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm`: the same arguments, parameters and values; backward keeps two numbers a row beyond the input."""

    @functools.wraps(nnx.LayerNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(**arguments.options("LayerNorm", super().__init__, args, kwargs))

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        x, parameters, dtype = arguments.promoted(self, x, self.scale, self.bias)
        (scale, bias), mask = arguments.along(self, x, self.feature_axes, *parameters), arguments.masked(self, x, mask)
        over = arguments.over(self, x.ndim, self.reduction_axes)
        return LayerNormFunction.apply(x, scale, bias, self.epsilon, mask=mask, over=over, dtype=dtype)
