"""Normalisation of groups of features, over space and the features of a group.

    x̂ = (x - mean) rstd,  y = scale x̂ + bias,   mean and rstd = (var + epsilon)^-1/2 of each example and group

With g = scale dy the cotangent of x̂, and means over the elements of a group:

    dx = rstd (g - mean(g) - x̂ mean(g x̂)),  dscale = Σ dy x̂,  dbias = Σ dy

All sums are made from Σ dy and Σ dy x̂ over space, one number for each example and feature.

Saved: x, scale and two float32 numbers for each example and group. x̂ is recomputed from them.

Reference: Wu and He, "Group Normalization", 2018.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.core.function import Function
from layers.core.numerics import safe_rsqrt
from layers.core.recompute import barrier
from layers.norms import statistics
from layers.norms.statistics import affine, as_computed


class GroupNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, num_groups, epsilon, *, mask=None, over=None, dtype=None):
        over = over or space_and_group(x.ndim)
        xw, scale_w, bias_w = (_grouped(as_computed(a, dtype), num_groups) for a in (x, scale, bias))
        mask = _grouped(mask, num_groups)
        mean, var = over.moments(xw, over.weight(xw, mask))
        rstd = safe_rsqrt(var + epsilon)
        ctx.save_for_backward(x, scale, mask, mean, rstd)
        ctx.num_groups, ctx.over, ctx.dtype, ctx.has_bias = num_groups, over, dtype, bias is not None
        return affine((xw - mean) * rstd, scale_w, bias_w).reshape(x.shape).astype(dtype or x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, scale, mask, mean, rstd), dy = barrier(ctx.saved_tensors, dy)
        over, num_groups = ctx.over, ctx.num_groups
        mean, rstd = (_by_feature(a, x.shape[-1]) for a in (mean, rstd))
        space = tuple(a + 1 for a in over.axes[:-1])
        group, scale_w = replace(over, axes=(-1,)), as_computed(scale, ctx.dtype)
        spread = lambda sums: _by_feature(group.total(_grouped(affine(sums, scale_w, None), num_groups)), x.shape[-1])

        dy, centred = as_computed(dy, ctx.dtype), as_computed(x, ctx.dtype) - mean
        sum_dy, sum_dy_xhat = dy.sum(space, keepdims=True), (dy * centred).sum(space, keepdims=True) * rstd
        weight = over.weight(_grouped(centred, num_groups), mask)
        weight = weight if isinstance(weight, float) else weight.reshape(x.shape)
        dx = affine(rstd, scale_w, None) * dy - weight * (rstd * spread(sum_dy) + rstd**2 * spread(sum_dy_xhat) * centred)
        batch = tuple(range(x.ndim - 1))
        return dx, None if scale is None else sum_dy_xhat.sum(batch), sum_dy.sum(batch) if ctx.has_bias else None, None, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 6), (6,), (6,))
        x, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, scale, bias, 2, 1e-6


def group_norm(
    x: Float[Array, "batch *space features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    num_groups: int = 32,
    epsilon: float = 1e-6,
) -> Float[Array, "batch *space features"]:
    """Shifts and scales each group of features of each example to mean 0 and variance 1.

    Statistics are of float32 or wider; a constant group gives `bias` and finite gradients, with `epsilon=0` too.

    Args:
        x: examples, of any number of axes of space, features last.
        scale: multiplies each feature; None for 1.
        bias: is added to each feature; None for 0.
        num_groups: the number of groups that the features, in order, are divided into.
        epsilon: is added to the variance.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: where `scale` or `bias` does not fit the last axis of `x`, or `num_groups` does not divide it.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x = jnp.asarray(x)
    scale, bias = (None if p is None else jnp.asarray(p) for p in (scale, bias))
    statistics.check_features("group_norm", x, scale=scale, bias=bias)
    statistics.check_epsilon("group_norm", epsilon)
    if x.ndim < 2:
        raise ValueError(f"group_norm: x has shape {x.shape}, but needs a batch axis and a feature axis: use x[None]")
    if num_groups < 1 or x.shape[-1] % num_groups:
        raise ValueError(f"group_norm: num_groups is {num_groups}, but must divide the last axis of x, {x.shape[-1]} (x: {x.shape})")
    return GroupNormFunction.apply(x, scale, bias, num_groups, epsilon)


class GroupNorm(nnx.GroupNorm):
    """`flax.nnx.GroupNorm`: the same arguments, parameters and values; backward keeps two numbers a group beyond the input.

    With several groups and `reduction_axes` without all axes of space, (-1,) for one, values are those of the formula, where Flax's are not:
    it repeats the mean of a group along axis 1 in place of the features.
    """

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        x, (scale, bias), dtype = statistics.promoted(self, jnp.asarray(x), self.scale, self.bias)
        axes = range(1, x.ndim) if self.reduction_axes is None else self.reduction_axes
        axes = statistics.from_the_end(x.ndim, axes)
        if axes[-1] != -1:
            raise ValueError(f"GroupNorm: reduction_axes is {self.reduction_axes}, but must contain the last axis, the features")
        over = statistics.module_over(self, x.ndim + 1, [a - 1 for a in axes[:-1]] + [-1])
        return GroupNormFunction.apply(x, scale, bias, self.num_groups, self.epsilon, mask=mask, over=over, dtype=dtype)


def space_and_group(ndim: int) -> statistics.Over:
    """For `x` of `ndim` axes whose features are split in two: all axes but the batch and the group."""
    return statistics.Over((*range(-ndim, -2), -1))


def _by_feature(x: jax.Array, features: int) -> jax.Array:
    """One number a group, (..., groups, 1), repeated for each of its features."""
    return jnp.broadcast_to(x, (*x.shape[:-1], features // x.shape[-2])).reshape(*x.shape[:-2], features)


def _grouped(x: Any, num_groups: int) -> Any:
    return None if x is None else x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
