"""Root-mean-square normalisation of rows.

    rstd = (mean(x²) + epsilon)^-1/2,  x̂ = x rstd,  y = scale x̂

With g = scale dy the cotangent of x̂:

    dx = rstd (g - x̂ mean(g x̂)),  dscale = Σ dy x̂

Saved: x, scale and the float32 rstd of each row. x̂ is one product away from them, so it is recomputed, in blocks of rows.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
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


class RMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, epsilon, *, mask=None, over=ROWS, dtype=None):
        xw = as_computed(x, dtype)
        rstd = safe_rsqrt(over.mean_square(xw, over.weight(xw, mask)) + epsilon)
        ctx.save_for_backward(x, scale, mask, rstd)
        ctx.over, ctx.dtype = over, dtype
        return affine(xw * rstd, as_computed(scale, dtype), None).astype(dtype or x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, scale, mask, rstd), over, dtype = ctx.saved_tensors, ctx.over, ctx.dtype

        def grads(dy, x, rstd):
            dy, xhat = as_computed(dy, dtype), as_computed(x, dtype) * rstd
            g = affine(dy, as_computed(scale, dtype), None)
            dx = rstd * (g - over.weight(xhat, mask) * xhat * over.total(g * xhat))
            return dx.astype(x.dtype), statistics.sum_to(dy * xhat, scale)

        if mask is None and over.by_rows() and statistics.has_blocks(x):
            dx, dscale = statistics.in_row_blocks(grads, (dy, x, rstd))
        else:
            (x, rstd), dy = barrier((x, rstd), dy)
            dx, dscale = grads(dy, x, rstd)
        return dx, dscale, None

    @staticmethod
    def example(key, dtype):
        x, scale = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key), ((2, 3, 5), (5,)), strict=True))
        return x, scale, 1e-6


def rms_norm(
    x: Float[Array, "*batch features"], scale: Float[Array, " features"] | None = None, *, epsilon: float = 1e-6
) -> Float[Array, "*batch features"]:
    """Divides each row by its root mean square.

    Statistics are of float32 or wider; a row of zeros gives zeros and finite gradients, with `epsilon=0` too.

    Args:
        x: rows of features.
        scale: multiplies each feature; None for 1.
        epsilon: is added to the mean square.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: where `scale` does not fit the last axis of `x`.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x = jnp.asarray(x)
    scale = None if scale is None else jnp.asarray(scale)
    statistics.check_features("rms_norm", x, scale=scale)
    statistics.check_epsilon("rms_norm", epsilon)
    return RMSNormFunction.apply(x, scale, epsilon)


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm`: the same arguments, parameters and values; backward keeps one number a row beyond the input."""

    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        x, (scale,), dtype = statistics.promoted(self, jnp.asarray(x), self.scale)
        scale = statistics.along(x, self.feature_axes, scale)
        over = statistics.module_over(self, x.ndim, self.reduction_axes)
        return RMSNormFunction.apply(x, scale, self.epsilon, mask=mask, over=over, dtype=dtype)
