"""The values of one function with the gradient of another.

Forward   y = forward_fn(*args)
Backward  dargs = the vector-Jacobian product of backward_fn at args with dy
Saved     args.

Reference: Neftci, Mostafa and Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.core.trees import is_array, is_inexact, kind_of
from layers.function.function import Function


class ReplaceGradientFunction(Function):
    @staticmethod
    def forward(ctx, forward_fn, backward_fn, tree, *leaves):
        ctx.slope, ctx.tree, ctx.leaves = backward_fn, tree, leaves
        return tuple(jnp.asarray(y) for y in jax.tree.leaves(_call(forward_fn, tree, leaves)))

    @staticmethod
    def backward(ctx, *dy):
        def outputs(arrays):
            return [y for y in map(jnp.asarray, jax.tree.leaves(_call(ctx.slope, ctx.tree, ctx.leaves, arrays))) if is_inexact(y)]

        pull = jax.vjp(outputs, {i: x for i, x in enumerate(ctx.leaves) if is_array(x) and is_inexact(x)})[1]
        (dx,) = pull([d for d in dy if d is not None and is_inexact(d)])
        return None, None, None, *(dx.get(i) for i in range(len(ctx.leaves)))

    @staticmethod
    def surrogate(forward_fn, backward_fn, tree, *leaves):
        return tuple(jax.tree.leaves(_call(backward_fn, tree, leaves)))

    @staticmethod
    def example(key, dtype):
        return jnp.sign, jnp.tanh, jax.tree.structure(((0,), {})), jax.random.normal(key, (3, 4), dtype)

    @staticmethod
    def examples(key, dtype):
        *how, x = ReplaceGradientFunction.example(key, dtype)
        return {"infinite": (*how, x.at[0].set(jnp.inf)), "far out": (*how, 1e4 * x), "empty": (*how, x[:0])}


def _call(fn: Callable[..., Any], tree: Any, leaves: Sequence[Any], arrays: dict[int, Any] | None = None) -> Any:
    """`fn` of the arguments with these leaves, some of which `arrays` takes the place of."""
    args, kwargs = jax.tree.unflatten(tree, [(arrays or {}).get(i, x) for i, x in enumerate(leaves)])
    return fn(*args, **kwargs)


def replace_gradient(forward_fn: Callable[..., Any], backward_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the values of `forward_fn` and the gradient of `backward_fn`, such as a step with the slope of a sigmoid.

    Args:
        forward_fn: any JAX function; it need not be differentiable.
        backward_fn: a differentiable function of the same arguments with results of the same structure, shapes and dtypes.

    Returns:
        `(*args, **kwargs) -> forward_fn(*args, **kwargs)`, differentiable in every floating-point array of them. It raises ValueError where the two
        functions' results differ in structure, shape or dtype: a comparison, whose result is of bool, is cast to that of the slope.
    """

    checks.function("replace_gradient", "forward_fn", forward_fn)
    checks.function("replace_gradient", "backward_fn", backward_fn)

    @functools.wraps(forward_fn)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = {i: x for i, x in enumerate(leaves) if is_array(x)}
        value, slope = (jax.eval_shape(functools.partial(_call, fn, tree, leaves), arrays) for fn in (forward_fn, backward_fn))
        if jax.tree.map(kind_of, value) != jax.tree.map(kind_of, slope):
            raise ValueError(
                f"replace_gradient: forward_fn gives {value}, but backward_fn {slope}; structure, shapes and dtypes must be the same: "
                "cast what forward_fn returns, .astype(x.dtype)"
            )
        return jax.tree.unflatten(jax.tree.structure(value), ReplaceGradientFunction.apply(forward_fn, backward_fn, tree, *leaves))

    return replaced
