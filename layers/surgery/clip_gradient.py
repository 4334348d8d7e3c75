"""A gradient clipped on its way back, by value or by norm.

Forward   y = x
Backward  dx = clip(dy, -max_value, max_value), then dx min(1, max_norm / |dx|)
Saved     nothing.

|dx| is the 2-norm over all leaves of the pytree together, accumulated in float32 or wider. The rule is not linear in dy, so no function has this
gradient; forward mode, which has no gradient to clip, is that of the forward. Under `vmap` each example is clipped for itself, under `shard_map`
the part of each device.

Reference: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core.function import Function
from layers.core.numerics import safe_reciprocal, wide
from layers.core.trees import map_floating_together


class ClipGradientFunction(Function):
    @staticmethod
    def forward(ctx, x, max_value, max_norm):
        ctx.max_value, ctx.max_norm = max_value, max_norm
        return x

    @staticmethod
    def backward(ctx, dy):
        dx = dy
        if ctx.max_value is not None:
            dx = [jnp.clip(d, -ctx.max_value, ctx.max_value) for d in dx]
        if ctx.max_norm is not None:
            shrink = _shrink_to(ctx.max_norm, dx)
            dx = [(d * shrink).astype(d.dtype) for d in dx]
        return dx, None, None

    @staticmethod
    def jvp(ctx, x_dot, *_):
        return x_dot


def _shrink_to(max_norm: Any, dx: list[Any]) -> jax.Array:
    """min(1, max_norm / |dx|), where |dx| may be too large or too small to be squared."""
    sizes = [jnp.abs(d).astype(wide(d.real.dtype)) for d in dx]
    largest = functools.reduce(jnp.maximum, [jnp.max(s, initial=0) for s in sizes], jnp.zeros((), jnp.float32))
    unit = safe_reciprocal(jnp.where(jnp.isfinite(largest), largest, 1))
    norm = jnp.sqrt(sum((jnp.sum(jnp.square(s * unit)) for s in sizes), jnp.zeros(())))
    return jnp.where(norm == 0, 1, jnp.minimum(1, max_norm * unit * safe_reciprocal(norm)))


def clip_gradient(x: Any, *, max_value: float | None = None, max_norm: float | None = None) -> Any:
    """Returns `x`; its gradient comes back clipped.

    Args:
        x: an array or pytree of arrays, of any shape; integer leaves go through.
        max_value: bound on the absolute value of each entry of the gradient.
        max_norm: bound on the 2-norm of the gradient, over all leaves together, after `max_value`.

    Raises:
        ValueError: if neither bound is given, or one is negative; TypeError: if `max_value` is given for complex arrays.
    """
    if max_value is None and max_norm is None:
        raise ValueError("clip_gradient: give max_value, max_norm or both")
    for name, bound in (("max_value", max_value), ("max_norm", max_norm)):
        if isinstance(bound, (int, float, np.number)) and bound < 0:
            raise ValueError(f"clip_gradient: {name} is {bound}, but a bound must not be negative")
    if max_value is not None and any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x)):
        raise TypeError("clip_gradient: max_value has no meaning for complex arrays; use max_norm")
    return map_floating_together("clip_gradient", lambda leaves: ClipGradientFunction.apply(leaves, max_value, max_norm), x)
