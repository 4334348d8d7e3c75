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
from jax import lax

from layers.core import checks
from layers.core.trees import is_inexact, kind_of, map_floating
from layers.function.function import Function


class StraightThroughFunction(Function):
    @staticmethod
    def forward(ctx, x, y):
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, None

    @staticmethod
    def surrogate(x, y):
        return x

    @staticmethod
    def example(key, dtype):
        x = 3 * jax.random.normal(key, (3, 4), dtype)
        return x, jnp.round(x)

    @staticmethod
    def examples(key, dtype):
        x, y = StraightThroughFunction.example(key, dtype)
        return {"infinite": (x.at[0].set(jnp.inf), -y), "far out": (1e4 * x, y), "empty": (x[:0], y[:0])}


def straight_through(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function with the values of `fn` and the gradient of the identity.

    Args:
        fn: maps an array or pytree to one of the same structure, shapes and dtypes. It need not be differentiable; what it closes over gets
            no gradient.

    Returns:
        `x -> fn(x)`; the gradient of its result is returned for `x` as it is. It raises ValueError where `fn` changes structure, shape or dtype.
    """

    checks.function("straight_through", "fn", fn)

    @functools.wraps(fn)
    def estimator(x: Any) -> Any:
        before, after = jax.eval_shape(lambda v: v, x), jax.eval_shape(fn, x)
        if jax.tree.map(kind_of, before) != jax.tree.map(kind_of, after):
            raise ValueError(f"straight_through: {getattr(fn, '__name__', fn)} maps {before} to {after}; both must be alike")
        y = fn(map_floating("straight_through", lax.stop_gradient, x))
        return jax.tree.map(lambda x, y: StraightThroughFunction.apply(x, y) if is_inexact(jnp.asarray(x)) else y, x, y)

    return estimator
