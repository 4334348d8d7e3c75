"""A residual sum and its root-mean-square normalisation, in one.

    sum = x + residual,  x̂ = sum rstd,  y = scale x̂,   rstd = (mean(sum²) + epsilon)^-1/2 of each row

With g = scale dy the cotangent of x̂, and dsum that of the sum itself:

    dx = dresidual = dsum + rstd (g - x̂ mean(g x̂)),  dscale = Σ dy x̂

Saved: the sum, which the next residual sum needs anyway, scale and the float32 rstd of each row. One array is the gradient of both summands.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Liger-Kernel, `fused_add_rms_norm`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core.function import Function
from layers.core.numerics import safe_rsqrt, wide
from layers.core.recompute import barrier
from layers.norms import statistics
from layers.norms.statistics import ROWS, affine


class AddRMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, residual, scale, epsilon):
        total = x + residual
        xw = total.astype(wide(total.dtype))
        rstd = safe_rsqrt(ROWS.mean_square(xw, ROWS.weight(xw, None)) + epsilon)
        ctx.save_for_backward(total, scale, rstd)
        return affine(xw * rstd, scale, None).astype(total.dtype), total

    @staticmethod
    def backward(ctx, dy, dsum):
        total, scale, rstd = ctx.saved_tensors

        def grads(dy, dsum, total, rstd):
            dy, xhat = dy.astype(rstd.dtype), total * rstd
            g = affine(dy, scale, None)
            d = dsum + rstd * (g - ROWS.weight(xhat, None) * xhat * ROWS.total(g * xhat))
            return d.astype(total.dtype), statistics.sum_to(dy * xhat, scale)

        if statistics.has_blocks(total):
            d, dscale = statistics.in_row_blocks(grads, (dy, dsum, total, rstd))
        else:
            (total, rstd), (dy, dsum) = barrier((total, rstd), (dy, dsum))
            d, dscale = grads(dy, dsum, total, rstd)
        return d, d, dscale, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 5), (2, 3, 5), (5,))
        x, residual, scale = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, residual, scale, 1e-6


def add_rms_norm(
    x: Float[Array, "*batch features"],
    residual: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> tuple[Float[Array, "*batch features"], Float[Array, "*batch features"]]:
    """Adds a residual and divides each row of the sum by its root mean square.

    Statistics are of float32 or wider; a row of zeros gives zeros and finite gradients, with `epsilon=0` too.

    Args:
        x: rows of features.
        residual: what is added to `x`.
        scale: multiplies each feature of the normalised sum; None for 1.
        epsilon: is added to the mean square.

    Returns:
        `(y, sum)`: the normalised sum and the sum, of the shape of `x` and the common dtype of `x` and `residual`.

    Raises:
        ValueError: where `residual` has another shape than `x`, or `scale` does not fit their last axis.
        TypeError: where `x` or `residual` is not of a floating-point dtype.
    """
    x, residual = jnp.asarray(x), jnp.asarray(residual)
    scale = None if scale is None else jnp.asarray(scale)
    statistics.check_sum("add_rms_norm", x, residual, scale=scale)
    statistics.check_epsilon("add_rms_norm", epsilon)
    return AddRMSNormFunction.apply(x, residual, scale, epsilon)
