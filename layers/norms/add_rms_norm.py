"""A residual sum and its root-mean-square normalisation, in one.

    sum = x + residual,  x̂ = sum / root,  y = (scale + scale_offset) x̂,   root = (mean(sum²) + epsilon)^1/2 of each row

With g = (scale + scale_offset) dy the cotangent of x̂, and dsum that of the sum itself:

    dx = dresidual = dsum + (g - x̂ mean(g x̂)) / root,  dscale = Σ dy x̂

Saved: the sum, which the next residual sum needs anyway, scale and the float32 root of each row. One array is the gradient of both summands.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Liger-Kernel, `fused_add_rms_norm`.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from layers.core.constants import refuse_gradient
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.norms import arguments, statistics
from layers.norms.statistics import ROWS, affine, by_root, factor, standardized


class AddRMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, residual, scale, epsilon, scale_offset=0.0):
        total = x + residual
        xw = total.astype(wide(total.dtype))
        root = ROWS.root(xw, ROWS.weight(xw, None), epsilon)
        ctx.save_for_backward(total, scale, root)
        ctx.scale_offset = scale_offset
        return affine(standardized(xw, None, root), factor(scale, scale_offset), None).astype(total.dtype), total

    @staticmethod
    def backward(ctx, dy, dsum):
        total, scale, root = ctx.saved_tensors
        refuse_gradient("add_rms_norm", "epsilon", ctx.needs_input_grad[3])

        def grads(dy, dsum, total, root):
            dy, xhat = dy.astype(root.dtype), standardized(total.astype(root.dtype), None, root)
            g = affine(dy, factor(scale, ctx.scale_offset), None)
            d = dsum + by_root(g - ROWS.weight(xhat, None) * xhat * ROWS.total(g * xhat), root)
            return d.astype(total.dtype), statistics.sum_to(dy * xhat, scale)

        if statistics.has_blocks(total):
            d, dscale = statistics.in_row_blocks(grads, (dy, dsum, total, root))
        else:
            (total, root), (dy, dsum) = barrier((total, root), (dy, dsum))
            d, dscale = grads(dy, dsum, total, root)
        return d, d, dscale, None, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 5), (2, 3, 5), (5,))
        x, residual, scale = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, residual, scale, 1e-6

    @staticmethod
    def examples(key, dtype):
        x, residual, scale, epsilon = AddRMSNormFunction.example(key, dtype)
        return {
            "no scale": (x, residual, None, epsilon),
            "an offset of the scale": (x, residual, scale, epsilon, 1.0),
            "a sum of zeros": (x, -x, scale, epsilon),
            "far out": (1e4 * x, residual, scale, epsilon),
            "no rows": (x[:0], residual[:0], scale, epsilon),
        }


def add_rms_norm(
    x: Float[Array, "*batch features"],
    residual: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-6,
    scale_offset: float = 0.0,
) -> tuple[Float[Array, "*batch features"], Float[Array, "*batch features"]]:
    """Adds a residual and divides each row of the sum by its root mean square.

    Statistics are of float32 or wider; a row of zeros gives zeros and finite gradients, with `epsilon=0` too.

    Args:
        x: rows of features.
        residual: what is added to `x`.
        scale: multiplies each feature of the normalised sum; None for 1.
        epsilon: is added to the mean square.
        scale_offset: is added to `scale`, as in `rms_norm`.

    Returns:
        `(y, sum)`: the normalised sum and the sum, of the shape of `x` and the common dtype of `x` and `residual`.

    Raises:
        ValueError: where `residual` has another shape than `x`, or `scale` does not fit their last axis, or `epsilon` is negative.
        TypeError: where `x` or `residual` is not of a floating-point dtype.
    """
    x, residual, scale, epsilon = arguments.sums("add_rms_norm", x, residual, epsilon, scale=scale)
    scale, scale_offset = arguments.scale_and_offset("add_rms_norm", scale, scale_offset)
    return AddRMSNormFunction.apply(x, residual, scale, epsilon, scale_offset=scale_offset)
