"""Normalisation of each feature over the batch.

    x̂ = (x - mean) / root,  y = scale x̂ + bias,   mean and root = (var + epsilon)^1/2 of each feature over all other axes

With n elements a feature, on all devices of `axis_name` together:

    dbias = Σ dy,  dscale = Σ dy x̂,  dx = scale (dy - (Σ dy + x̂ Σ dy x̂) / n) / root

so that the sums over devices in backward are those of two numbers a feature.

Saved: x, scale and two float32 numbers a feature. x̂ is recomputed from them.

Reference: Ioffe and Szegedy, "Batch Normalization", 2015; Rota Bulò et al., "In-Place Activated BatchNorm", 2018.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.constants import refuse_gradient
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.norms import arguments, statistics
from layers.norms.statistics import Over, affine, as_computed, by_root, standardized, through_moments


class BatchNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, epsilon, mask=None, over=None, dtype=None):
        over = over or Over(tuple(range(-x.ndim, -1)))
        xw = as_computed(x, dtype)
        mean, var, root = over.moments(xw, over.weight(xw, mask), epsilon)
        y = affine(standardized(xw, mean, root, mask), as_computed(scale, dtype), as_computed(bias, dtype)).astype(dtype or x.dtype)
        running = mean.reshape(-1), var.reshape(-1)
        ctx.save_for_backward(x, scale, mask, mean, root)
        ctx.over, ctx.dtype, ctx.bias = over, dtype, None if bias is None else jax.ShapeDtypeStruct(bias.shape, bias.dtype)
        ctx.mark_non_differentiable(*running)
        return y, *running

    @staticmethod
    def backward(ctx, dy, _mean, _var):
        refuse_gradient("batch_norm", "epsilon", ctx.needs_input_grad[3])
        (x, scale, mask, mean, root), dy = barrier(ctx.saved_tensors, dy)
        over = ctx.over
        dy, xhat = as_computed(dy, ctx.dtype), standardized(as_computed(x, ctx.dtype), mean, root, mask)
        dxhat = dy - through_moments(over.total(dy), over.total(dy * xhat), xhat, over.weight(xhat, mask))
        dx = by_root(dxhat, root, as_computed(scale, ctx.dtype))
        return dx, statistics.sum_to(dy * xhat, scale), statistics.sum_to(dy, ctx.bias), None, None, None, None

    @staticmethod
    def surrogate(x, scale, bias, epsilon, mask=None, over=None, dtype=None):
        axes, scale, bias = tuple(range(x.ndim - 1)), 1 if scale is None else scale, 0 if bias is None else bias
        where = None if mask is None else jnp.broadcast_to(mask, x.shape)
        mean, var = x.mean(axes, where=where), x.var(axes, where=where)
        y = (x - mean) * jax.lax.rsqrt(var + epsilon) * scale + bias
        return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)

    @staticmethod
    def example(key, dtype):
        shapes = ((4, 3, 5), (5,), (5,))
        x, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, scale, bias, 1e-5

    @staticmethod
    def examples(key, dtype):
        x, scale, bias, epsilon = BatchNormFunction.example(key, dtype)
        mask = jnp.arange(12).reshape(4, 3, 1) % 5 > 0
        return {
            "no scale": (x, None, bias, epsilon),
            "no bias": (x, scale, None, epsilon),
            "equal numbers of a feature": (jnp.ones_like(x), scale, bias, epsilon),
            "far out": (1e4 * x, scale, bias, epsilon),
            "masked, over an axis of its own, computed in float64": (x, scale, bias, epsilon, mask, Over((-3, -2), fast=True), jnp.float64),
            "one row": (x[:1, :1], scale, bias, epsilon),
            "no rows": (x[:0], scale, bias, epsilon),
        }


def batch_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-5,
    axis_name: str | None = None,
) -> tuple[Float[Array, "*batch features"], Float[Array, " features"], Float[Array, " features"]]:
    """Shifts and scales each feature to mean 0 and variance 1 over the batch.

    Statistics are of float32 or wider; a constant feature gives `bias` and finite gradients, with `epsilon=0` too.

    Args:
        x: the batch, of any number of axes, features last.
        scale: multiplies each feature; None for 1.
        bias: is added to each feature; None for 0.
        epsilon: is added to the variance.
        axis_name: a mapped axis whose devices hold parts of one batch.

    Returns:
        `(y, mean, var)`: an array of the shape and dtype of `x`, and the statistics for running averages, through which no gradient goes.

    Raises:
        ValueError: where `scale` or `bias` does not fit the last axis of `x`, `epsilon` is negative, or no axis `axis_name` is mapped.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x, scale, bias, epsilon = arguments.rows("batch_norm", x, epsilon, scale=scale, bias=bias)
    checks.mesh_axes("batch_norm", "axis_name", axis_name)
    return BatchNormFunction.apply(x, scale, bias, epsilon, over=Over(tuple(range(-x.ndim, -1)), axis_name))


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`: the same arguments, parameters, running statistics and values; backward keeps two numbers a feature beyond the input."""

    @functools.wraps(nnx.BatchNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(**arguments.options("BatchNorm", super().__init__, args, kwargs))

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> jax.Array:
        if first_from(
            checks.flag("BatchNorm", "use_running_average", use_running_average, optional=True),
            self.use_running_average,
            error_msg="BatchNorm: give `use_running_average` to the constructor or to the call, or use `nnx.view(model, use_running_average=...)`",
        ):
            return super().__call__(x, True)
        x, parameters, dtype = arguments.promoted(self, x, self.scale, self.bias)
        features = arguments.from_the_end("BatchNorm", "axis", self.axis, x.ndim)
        (scale, bias), mask = arguments.along(self, x, features, *parameters), arguments.masked(self, x, mask)
        over = arguments.over(self, x.ndim, [a for a in range(-x.ndim, 0) if a not in features])
        y, mean, var = BatchNormFunction.apply(x, scale, bias, self.epsilon, mask=mask, over=over, dtype=dtype)
        for running, batch in ((self.mean, mean), (self.var, var)):
            running[...] = (self.momentum * running[...] + (1 - self.momentum) * batch).astype(running[...].dtype)
        return y
