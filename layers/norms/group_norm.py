"""Normalisation of groups of features, over space and the features of a group.

    x̂ = (x - mean) / root,  y = scale x̂ + bias,   mean and root = (var + epsilon)^1/2 of each example and group

With g = scale dy the cotangent of x̂, and means over the elements of a group:

    dx = (g - mean(g) - x̂ mean(g x̂)) / root,  dscale = Σ dy x̂,  dbias = Σ dy

All sums are made from Σ dy and Σ dy x̂ over space, one number for each example and feature.

Saved: x, scale and two float32 numbers for each example and group. x̂ is recomputed from them.

Reference: Wu and He, "Group Normalization", 2018.
"""

from __future__ import annotations

import functools
from dataclasses import replace
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
from layers.norms.statistics import affine, as_computed, standard_factors, standardized, through_moments


class GroupNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, num_groups, epsilon, mask=None, over=None, dtype=None):
        over = over or space_and_group(x.ndim)
        xw, scale_w, bias_w = (_grouped(as_computed(a, dtype), num_groups) for a in (x, scale, bias))
        mask_g = _grouped(mask, num_groups)
        mean, _, root = over.moments(xw, over.weight(xw, mask_g), epsilon)
        ctx.save_for_backward(x, scale, mask, mean, root)
        ctx.num_groups, ctx.over, ctx.dtype, ctx.has_bias = num_groups, over, dtype, bias is not None
        return affine(standardized(xw, mean, root, mask_g), scale_w, bias_w).reshape(x.shape).astype(dtype or x.dtype)

    @staticmethod
    def backward(ctx, dy):
        refuse_gradient("group_norm", "epsilon", ctx.needs_input_grad[4])
        (x, scale, mask, mean, root), dy = barrier(ctx.saved_tensors, dy)
        over, num_groups = ctx.over, ctx.num_groups
        mean, root = (_by_feature(a, x.shape[-1]) for a in (mean, root))
        space = tuple(a + 1 for a in over.axes[:-1])
        group, scale_w = replace(over, axes=(-1,)), as_computed(scale, ctx.dtype)
        spread = lambda sums: _by_feature(group.total(_grouped(affine(sums, scale_w, None), num_groups)), x.shape[-1])

        dy, (centred, factor) = as_computed(dy, ctx.dtype), standard_factors(as_computed(x, ctx.dtype), mean, root, mask)  # x̂ = factor centred factor
        sum_dy, sum_dy_xhat = dy.sum(space, keepdims=True), ((dy * factor) * centred).sum(space, keepdims=True) * factor
        weight = over.weight(_grouped(centred, num_groups), _grouped(mask, num_groups))
        weight = weight if isinstance(weight, float) else weight.reshape(x.shape)
        moments = through_moments(spread(sum_dy), spread(sum_dy_xhat) * factor * factor, centred, weight)
        half = factor / 2  # 1 / root = half half; with a constant among the factors XLA would write out a whole array of it
        dx = (affine(dy, scale_w, None) - moments) * half * half
        batch = tuple(range(x.ndim - 1))
        return dx, None if scale is None else sum_dy_xhat.sum(batch), sum_dy.sum(batch) if ctx.has_bias else None, None, None, None, None, None

    @staticmethod
    def example(key, dtype):
        shapes = ((2, 3, 6), (6,), (6,))
        x, scale, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
        return x, scale, bias, 2, 1e-6

    @staticmethod
    def examples(key, dtype):
        x, scale, bias, *rest = GroupNormFunction.example(key, dtype)
        mask = jnp.arange(36).reshape(x.shape) % 4 > 0
        return {
            "no scale": (x, None, bias, *rest),
            "no bias": (x, scale, None, *rest),
            "equal numbers in a group": (jnp.ones_like(x), scale, bias, *rest),
            "far out": (1e4 * x, scale, bias, *rest),
            "masked, computed in float64": (x, scale, bias, *rest, mask, replace(space_and_group(x.ndim), fast=True), jnp.float64),
            "no rows": (x[:0], scale, bias, *rest),
        }


def group_norm(
    x: Float[Array, "batch *space features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    num_groups: int = 32,
    epsilon: float | Float[Array, ""] = 1e-6,
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
    x, scale, bias, epsilon = arguments.rows("group_norm", x, epsilon, scale=scale, bias=bias)
    num_groups = checks.integer("group_norm", "num_groups", num_groups, "[1, inf)")
    if x.ndim < 2:
        raise ValueError(f"group_norm: x has shape {x.shape}, but must have a batch axis and a feature axis: x[None]")
    if x.shape[-1] % num_groups:
        raise ValueError(f"group_norm: num_groups is {num_groups}, but must divide the last axis of x, {x.shape[-1]} (x: {x.shape})")
    return GroupNormFunction.apply(x, scale, bias, num_groups, epsilon)


class GroupNorm(nnx.GroupNorm):
    """`flax.nnx.GroupNorm`: the same arguments, parameters and values; backward keeps two numbers a group beyond the input.

    With several groups and `reduction_axes` without all axes of space, (-1,) for one, values are those of the formula, where Flax's are not:
    it repeats the mean of a group along axis 1 in place of the features.
    """

    @functools.wraps(nnx.GroupNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        given = arguments.options("GroupNorm", super().__init__, args, kwargs)
        features, groups, size = (given[what] for what in ("num_features", "num_groups", "group_size"))
        if (groups is None) == (size is None):
            raise ValueError(f"GroupNorm: num_groups is {groups} and group_size {size}, but one of them must be None")
        if features % (groups or size):
            raise ValueError(f"GroupNorm: {'group_size' if size else 'num_groups'} is {groups or size}, but must divide num_features, {features}")
        super().__init__(**given)

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        x, parameters, dtype = arguments.promoted(self, x, self.scale, self.bias)
        (scale, bias), mask = arguments.along(self, x, -1, *parameters), arguments.masked(self, x, mask)
        if x.shape[-1] % self.num_groups:
            raise ValueError(f"GroupNorm: x has shape {x.shape}, but num_groups = {self.num_groups} must divide its last axis")
        axes = range(1, x.ndim) if self.reduction_axes is None else self.reduction_axes
        axes = arguments.from_the_end("GroupNorm", "reduction_axes", axes, x.ndim)
        if axes[-1] != -1:
            raise ValueError(f"GroupNorm: reduction_axes is {self.reduction_axes}, but must contain the last axis, the features")
        over = arguments.over(self, x.ndim + 1, [a - 1 for a in axes[:-1]] + [-1])
        return GroupNormFunction.apply(x, scale, bias, self.num_groups, self.epsilon, mask=mask, over=over, dtype=dtype)


def space_and_group(ndim: int) -> statistics.Over:
    """For `x` of `ndim` axes whose features are split in two: all axes but the batch and the group."""
    return statistics.Over((*range(-ndim, -2), -1))


def _by_feature(x: jax.Array, features: int) -> jax.Array:
    """One number a group, (..., groups, 1), repeated for each of its features."""
    return jnp.broadcast_to(x, (*x.shape[:-1], features // x.shape[-2])).reshape(*x.shape[:-2], features)


def _grouped(x: Any, num_groups: int) -> Any:
    """The features of an array in groups; None for None. An array of one for all features has one for all groups."""
    if x is None or x.shape[-1] == 1:
        return None if x is None else x[..., None]
    return x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
