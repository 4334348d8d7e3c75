"""Normalisation of each feature over the batch.

    x̂ = (x - mean) rstd,  y = scale x̂ + bias,   mean and rstd = (var + epsilon)^-1/2 of each feature over all other axes

With n elements a feature, on all devices of `axis_name` together:

    dbias = Σ dy,  dscale = Σ dy x̂,  dx = scale rstd (dy - (Σ dy + x̂ Σ dy x̂) / n)

so that the sums over devices in backward are those of two numbers a feature.

Saved: x, scale and two float32 numbers a feature. x̂ is recomputed from them.

Reference: Ioffe and Szegedy, "Batch Normalization", 2015; Rota Bulò et al., "In-Place Activated BatchNorm", 2018.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from jaxtyping import Array, Float

from layers.core.function import Function
from layers.core.numerics import safe_rsqrt
from layers.core.recompute import barrier
from layers.norms import statistics
from layers.norms.statistics import Over, affine, as_computed


class BatchNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, epsilon, *, mask=None, over=None, dtype=None):
        over = over or Over(tuple(range(-x.ndim, -1)))
        xw = as_computed(x, dtype)
        mean, var = over.moments(xw, over.weight(xw, mask))
        rstd = safe_rsqrt(var + epsilon)
        y = affine((xw - mean) * rstd, as_computed(scale, dtype), as_computed(bias, dtype)).astype(dtype or x.dtype)
        running = mean.reshape(-1), var.reshape(-1)
        ctx.save_for_backward(x, scale, mask, mean, rstd)
        ctx.over, ctx.dtype, ctx.bias = over, dtype, None if bias is None else jax.ShapeDtypeStruct(bias.shape, bias.dtype)
        ctx.mark_non_differentiable(*running)
        return y, *running

    @staticmethod
    def backward(ctx, dy, _mean, _var):
        (x, scale, mask, mean, rstd), dy = barrier(ctx.saved_tensors, dy)
        over = ctx.over
        dy, xhat = as_computed(dy, ctx.dtype), (as_computed(x, ctx.dtype) - mean) * rstd
        factor = affine(rstd, as_computed(scale, ctx.dtype), None)
        dx = factor * (dy - over.weight(xhat, mask) * (over.total(dy) + xhat * over.total(dy * xhat)))
        return dx, statistics.sum_to(dy * xhat, scale), statistics.sum_to(dy, ctx.bias), None

    @staticmethod
    def surrogate(x, scale, bias, epsilon):
        axes = tuple(range(x.ndim - 1))
        mean, var = x.mean(axes), x.var(axes)
        y = (x - mean) * jax.lax.rsqrt(var + epsilon) * scale + bias
        return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)

    @staticmethod
    def example(key, dtype):
        shapes = ((4, 3, 5), (5,), (5,))
        x, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, scale, bias, 1e-5


def batch_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    epsilon: float = 1e-5,
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
        ValueError: where `scale` or `bias` does not fit the last axis of `x`.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x = jnp.asarray(x)
    scale, bias = (None if p is None else jnp.asarray(p) for p in (scale, bias))
    statistics.check_features("batch_norm", x, scale=scale, bias=bias)
    statistics.check_epsilon("batch_norm", epsilon)
    return BatchNormFunction.apply(x, scale, bias, epsilon, over=Over(tuple(range(-x.ndim, -1)), axis_name))


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`: the same arguments, parameters, running statistics and values; backward keeps two numbers a feature beyond the input."""

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> jax.Array:
        if first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: give `use_running_average` to the constructor or to the call, or use `nnx.view(model, use_running_average=...)`",
        ):
            return super().__call__(x, True)
        x, (scale, bias), dtype = statistics.promoted(self, jnp.asarray(x), self.scale, self.bias)
        features = statistics.from_the_end(x.ndim, self.axis)
        scale, bias = (statistics.along(x, features, p) for p in (scale, bias))
        over = statistics.module_over(self, x.ndim, [a for a in range(-x.ndim, 0) if a not in features])
        y, mean, var = BatchNormFunction.apply(x, scale, bias, self.epsilon, mask=mask, over=over, dtype=dtype)
        for running, batch in ((self.mean, mean), (self.var, var)):
            running[...] = (self.momentum * running[...] + (1 - self.momentum) * batch).astype(running[...].dtype)
        return y
