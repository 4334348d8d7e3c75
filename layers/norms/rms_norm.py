"""Root-mean-square normalisation of rows.

    root = (mean(x²) + epsilon)^1/2,  x̂ = x / root,  y = (scale + scale_offset) x̂

With g = (scale + scale_offset) dy the cotangent of x̂:

    dx = (g - x̂ mean(g x̂)) / root,  dscale = Σ dy x̂

Saved: x, scale and the float32 root of each row. x̂ is one quotient away from them, so it is recomputed, in blocks of rows.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.constants import refuse_gradient
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.norms import arguments, statistics
from layers.norms.statistics import ROWS, Over, affine, as_computed, by_root, factor, standard_factors, standardized, weighted


class RMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, epsilon, scale_offset=0.0, mask=None, over=ROWS, dtype=None):
        xw = as_computed(x, dtype)
        root = over.root(xw, over.weight(xw, mask), epsilon)
        ctx.save_for_backward(x, scale, mask, root)
        ctx.over, ctx.dtype, ctx.scale_offset = over, dtype, scale_offset
        return affine(standardized(xw, None, root, mask), factor(scale, scale_offset, dtype), None).astype(dtype or x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, scale, mask, root), over, dtype = ctx.saved_tensors, ctx.over, ctx.dtype
        refuse_gradient("rms_norm", "epsilon", ctx.needs_input_grad[2])

        def grads(dy, x, root):
            dy, (xs, by) = as_computed(dy, dtype), standard_factors(as_computed(x, dtype), None, root, mask)  # x̂ = by xs by
            by_scale, products = factor(scale, ctx.scale_offset, dtype), dy * (xs * by)
            along = over.total(affine(products, by_scale, None)) * by
            dx = by_root(affine(dy, by_scale, None) - weighted(xs * (along * by * by), over.weight(xs, mask)), root)
            return dx.astype(x.dtype), statistics.sum_to(products * by, scale)

        if mask is None and over.by_rows() and statistics.has_blocks(x):
            dx, dscale = statistics.in_row_blocks(grads, (dy, x, root))
        else:
            (x, root), dy = barrier((x, root), dy)
            dx, dscale = grads(dy, x, root)
        return dx, dscale, None, None, None, None, None

    @staticmethod
    def example(key, dtype):
        x, scale = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key), ((2, 3, 5), (5,)), strict=True))
        return x, scale, 1e-6

    @staticmethod
    def examples(key, dtype):
        x, scale, epsilon = RMSNormFunction.example(key, dtype)
        mask = jnp.arange(30).reshape(x.shape) % 4 > 0
        return {
            "no scale": (x, None, epsilon),
            "an offset of the scale": (x, scale, epsilon, 1.0),
            "a row of zeros": (x.at[1, 1].set(0), scale, epsilon),
            "far out": (1e4 * x, scale, epsilon),
            "masked, over other axes, computed in float64": (x, scale, epsilon, 0.0, mask, Over((-2, -1), fast=True), jnp.float64),
            "no rows": (x[:0], scale, epsilon),
        }


def rms_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-6,
    scale_offset: float = 0.0,
) -> Float[Array, "*batch features"]:
    """Divides each row by its root mean square.

    Statistics are of float32 or wider; a row of zeros gives zeros and finite gradients, with `epsilon=0` too.

    Args:
        x: rows of features.
        scale: multiplies each feature; None for 1.
        epsilon: is added to the mean square.
        scale_offset: is added to `scale`: 1 for a model that keeps the difference from 1 (Gemma).

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: where `scale` does not fit the last axis of `x`, `epsilon` is negative, or there is an offset and no scale.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x, scale, epsilon = arguments.rows("rms_norm", x, epsilon, scale=scale)
    scale, scale_offset = arguments.scale_and_offset("rms_norm", scale, scale_offset)
    return RMSNormFunction.apply(x, scale, epsilon, scale_offset=scale_offset)


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm`: the same arguments, parameters and values; backward keeps one number a row beyond the input.

    Args:
        scale_offset: as in `rms_norm`. By default the scale starts as what makes 1 with it.
    """

    scale_offset = 0.0

    def __init__(self, *args: Any, scale_offset: float = 0.0, **kwargs: Any):
        given = arguments.options("RMSNorm", super().__init__, args, kwargs)
        scale_offset = checks.number("RMSNorm", "scale_offset", scale_offset)
        if scale_offset:
            if "scale_init" not in kwargs:
                given["scale_init"] = nnx.initializers.constant(1 - scale_offset)
            self.scale_offset = arguments.scale_and_offset("RMSNorm", given["use_scale"] or None, scale_offset)[1]
        super().__init__(**given)

    __init__.__signature__ = arguments.with_option(nnx.RMSNorm, "scale_offset", 0.0)  # type: ignore[attr-defined]

    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        x, (scale,), dtype = arguments.promoted(self, x, self.scale)
        (scale,), mask = arguments.along(self, x, self.feature_axes, scale), arguments.masked(self, x, mask)
        over = arguments.over(self, x.ndim, self.reduction_axes)
        return RMSNormFunction.apply(x, scale, self.epsilon, scale_offset=self.scale_offset, mask=mask, over=over, dtype=dtype)
