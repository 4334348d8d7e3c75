"""The straight-through estimator of any function.

Forward   y = fn(x)
Backward  dx = dy
Saved     nothing.

Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.function import Function


class StraightThroughFunction(Function):
    @staticmethod
    def forward(ctx, fn, x):
        return fn(x)

    @staticmethod
    def backward(ctx, dy):
        return None, dy

    @staticmethod
    def surrogate(fn, x):
        return x

    @staticmethod
    def example(key, dtype):
        return jnp.round, 3 * jax.random.normal(key, (3, 4), dtype)


def straight_through(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function with the values of `fn` and the gradient of the identity.

    Args:
        fn: maps an array, or a pytree other than a tuple, to one of the same structure, shapes and dtypes. It need not be differentiable.

    Returns:
        `x -> fn(x)`; the gradient of its result is returned for `x` as it is. It raises ValueError where `fn` changes structure, shape or dtype.
    """

    @functools.wraps(fn)
    def estimator(x: Any) -> Any:
        before, after = jax.eval_shape(lambda v: v, x), jax.eval_shape(fn, x)
        if isinstance(x, tuple) or jax.tree.map(lambda a: (a.shape, a.dtype), before) != jax.tree.map(lambda a: (a.shape, a.dtype), after):
            raise ValueError(f"straight_through: {getattr(fn, '__name__', fn)} maps {before} to {after}; both must be alike, and no tuple")
        return StraightThroughFunction.apply(fn, x)

    return estimator
