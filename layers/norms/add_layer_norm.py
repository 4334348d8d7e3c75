"""A residual sum and its normalisation to mean 0 and variance 1, in one.

    sum = x + residual,  x̂ = (sum - mean) / root,  y = scale x̂ + bias,   mean and root = (var + epsilon)^1/2 of each row

With g = scale dy the cotangent of x̂, and dsum that of the sum itself:

    dx = dresidual = dsum + (g - mean(g) - x̂ mean(g x̂)) / root,  dscale = Σ dy x̂,  dbias = Σ dy

Saved: the sum, which the next residual sum needs anyway, scale and two float32 numbers a row. One array is the gradient of both summands.

Reference: Ba, Kiros and Hinton, "Layer Normalization", 2016; Dao, `layer_norm_fn` of flash-attention.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from layers.core.constants import refuse_gradient
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.norms import arguments, statistics
from layers.norms.statistics import ROWS, affine, by_root, standardized


class AddLayerNormFunction(Function):
    @staticmethod
    def forward(ctx, x, residual, scale, bias, epsilon):
        total = x + residual
        xw = total.astype(wide(total.dtype))
        mean, _, root = ROWS.moments(xw, ROWS.weight(xw, None), epsilon)
        ctx.save_for_backward(total, scale, mean, root)
        ctx.bias = None if bias is None else jax.ShapeDtypeStruct(bias.shape, bias.dtype)
        return affine(standardized(xw, mean, root), scale, bias).astype(total.dtype), total

    @staticmethod
    def backward(ctx, dy, dsum):
        total, scale, mean, root = ctx.saved_tensors
        refuse_gradient("add_layer_norm", "epsilon", ctx.needs_input_grad[4])

        def grads(dy, dsum, total, mean, root):
            dy, xhat = dy.astype(root.dtype), standardized(total.astype(root.dtype), mean, root)
            g = affine(dy, scale, None)
            d = dsum + by_root(g - ROWS.weight(xhat, None) * (ROWS.total(g) + xhat * ROWS.total(g * xhat)), root)
            return d.astype(total.dtype), (statistics.sum_to(dy * xhat, scale), statistics.sum_to(dy, ctx.bias))

        if statistics.has_blocks(total):
            d, (dscale, dbias) = statistics.in_row_blocks(grads, (dy, dsum, total, mean, root))
        else:
            (total, mean, root), (dy, dsum) = barrier((total, mean, root), (dy, dsum))
            d, (dscale, dbias) = grads(dy, dsum, total, mean, root)
        return d, d, dscale, dbias, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 5), (2, 3, 5), (5,), (5,))
        x, residual, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 4), shapes, strict=True))
        return x, residual, scale, bias, 1e-6

    @staticmethod
    def examples(key, dtype):
        x, residual, scale, bias, epsilon = AddLayerNormFunction.example(key, dtype)
        return {
            "no scale": (x, residual, None, bias, epsilon),
            "no bias": (x, residual, scale, None, epsilon),
            "a sum of zeros": (x, -x, scale, bias, epsilon),
            "far out": (1e4 * x, residual, scale, bias, epsilon),
            "no rows": (x[:0], residual[:0], scale, bias, epsilon),
        }


def add_layer_norm(
    x: Float[Array, "*batch features"],
    residual: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-6,
) -> tuple[Float[Array, "*batch features"], Float[Array, "*batch features"]]:
    """Adds a residual and shifts and scales each row of the sum to mean 0 and variance 1.

    Statistics are of float32 or wider; a constant row gives `bias` and finite gradients, with `epsilon=0` too.

    Args:
        x: rows of features.
        residual: what is added to `x`.
        scale: multiplies each feature of the normalised sum; None for 1.
        bias: is added to each feature of it; None for 0.
        epsilon: is added to the variance.

    Returns:
        `(y, sum)`: the normalised sum and the sum, of the shape of `x` and the common dtype of `x` and `residual`.

    Raises:
        ValueError: where `residual` has another shape than `x`, or `scale` or `bias` does not fit their last axis, or `epsilon` is negative.
        TypeError: where `x` or `residual` is not of a floating-point dtype.
    """
    x, residual, scale, bias, epsilon = arguments.sums("add_layer_norm", x, residual, epsilon, scale=scale, bias=bias)
    return AddLayerNormFunction.apply(x, residual, scale, bias, epsilon)
