"""The values of one function with the gradient of another.

Forward   y = forward_fn(*args)
Backward  dargs = the vector-Jacobian product of backward_fn at args with dy
Saved     args.

Reference: Neftci, Mostafa and Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.function import Function


class ReplaceGradientFunction(Function):
    @staticmethod
    def forward(ctx, forward_fn, backward_fn, *args):
        ctx.backward_fn, ctx.args = backward_fn, args
        return forward_fn(*args)

    @staticmethod
    def backward(ctx, *dy):
        out, pull = jax.vjp(ctx.backward_fn, *ctx.args)
        return None, None, *pull(dy if isinstance(out, tuple) else dy[0])

    @staticmethod
    def surrogate(forward_fn, backward_fn, *args):
        return backward_fn(*args)

    @staticmethod
    def example(key, dtype):
        return jnp.sign, jnp.tanh, jax.random.normal(key, (3, 4), dtype)


def _kind(x: Any) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype


def replace_gradient(forward_fn: Callable[..., Any], backward_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the values of `forward_fn` and the gradient of `backward_fn`, such as a step with the slope of a sigmoid.

    Args:
        forward_fn: any JAX function; it need not be differentiable.
        backward_fn: a differentiable function of the same arguments with results of the same structure, shapes and dtypes.

    Returns:
        `(*args) -> forward_fn(*args)`, differentiable in every floating-point array of `args`. It raises ValueError where the two
        functions' results differ in structure, shape or dtype: a comparison, whose result is of bool, is cast to that of the slope.
    """

    @functools.wraps(forward_fn)
    def replaced(*args: Any) -> Any:
        value, slope = jax.eval_shape(forward_fn, *args), jax.eval_shape(backward_fn, *args)
        if jax.tree.map(_kind, value) != jax.tree.map(_kind, slope):
            raise ValueError(
                f"replace_gradient: forward_fn gives {value}, but backward_fn {slope}; structure, shapes and dtypes must be the same: "
                "cast what forward_fn returns, .astype(x.dtype)"
            )
        return ReplaceGradientFunction.apply(forward_fn, backward_fn, *args)

    return replaced
