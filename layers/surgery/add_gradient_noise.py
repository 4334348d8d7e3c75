"""Gaussian noise added to a gradient on its way back.

Forward   y = x
Backward  dx = dy + stddev n,  n ~ N(0, 1) drawn from key
Saved     key.

Forward mode, which has no gradient to add to, is that of the forward. The same key gives the same noise: to each example under `vmap`, at each step
of a `scan`, on each device under `shard_map`, unless each has a key of its own.

Reference: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015.
"""

from __future__ import annotations

from typing import Any

import jax

from layers.core import checks
from layers.core.trees import map_floating_together
from layers.function.function import Function


class AddGradientNoiseFunction(Function):
    @staticmethod
    def forward(ctx, x, key, stddev):
        ctx.key, ctx.stddev = key, stddev
        return x

    @staticmethod
    def backward(ctx, dy):
        keys = jax.random.split(ctx.key, max(len(dy), 1))
        noise = [jax.random.normal(k, d.shape, d.dtype) for k, d in zip(keys, dy, strict=False)]
        return [d + (ctx.stddev * n).astype(d.dtype) for d, n in zip(dy, noise, strict=True)], None, None

    @staticmethod
    def jvp(ctx, x_dot, *_):
        return x_dot


def add_gradient_noise(x: Any, key: jax.Array, *, stddev: float | jax.Array) -> Any:
    """Returns `x`; Gaussian noise is added to its gradient.

    Args:
        x: an array or pytree of arrays, of any shape; integer leaves go through.
        key: a key of `jax.random`, or an integer seed; the same key gives the same noise.
        stddev: standard deviation of the noise, a number or scalar array, in the units of the gradient.

    Raises:
        ValueError: if `stddev` is not a scalar, or not a finite number of at least 0.
        TypeError: if `stddev` is no number or `key` no key.
    """
    stddev = checks.number("add_gradient_noise", "stddev", stddev, "[0, inf)", traced=True)
    key = checks.key("add_gradient_noise", "key", key)
    return map_floating_together("add_gradient_noise", lambda leaves: AddGradientNoiseFunction.apply(leaves, key, stddev), x)
