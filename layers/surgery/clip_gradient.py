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

from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.core.lengths import divided, scaled_squares
from layers.core.numerics import wide
from layers.core.trees import map_floating_together
from layers.function.function import Function


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
            dx = _clip_norm(ctx.max_norm, dx)
        return dx, None, None

    @staticmethod
    def jvp(ctx, x_dot, *_):
        return x_dot


def _clip_norm(max_norm: Any, dx: list[Any]) -> list[Any]:
    """dx min(1, max_norm / |dx|). Where |dx| is too large or too small for its dtype |dx / s| is not, with s a power of two."""
    scale, squares = scaled_squares(dx)
    norm = jnp.sqrt(squares)
    inside = scale * norm <= max_norm
    shrink = max_norm / jnp.where(inside, 1, norm)
    return [jnp.where(inside, d, divided(d.astype(wide(d.dtype)), scale) * shrink).astype(d.dtype) for d in dx]


def clip_gradient(x: Any, *, max_value: float | jax.Array | None = None, max_norm: float | jax.Array | None = None) -> Any:
    """Returns `x`; its gradient comes back clipped.

    Args:
        x: an array or pytree of arrays, of any shape; integer leaves go through.
        max_value: bound on the absolute value of each entry of the gradient, a number or scalar array.
        max_norm: bound on the 2-norm of the gradient, over all leaves together, after `max_value`.

    Raises:
        ValueError: if neither bound is given, or one is negative, NaN or no scalar; TypeError: if one is no number, or `max_value` is given for
            complex arrays.
    """
    if max_value is None and max_norm is None:
        raise ValueError("clip_gradient: give max_value, max_norm or both")
    max_value = checks.number("clip_gradient", "max_value", max_value, "[0, inf]", traced=True, optional=True)
    max_norm = checks.number("clip_gradient", "max_norm", max_norm, "[0, inf]", traced=True, optional=True)

    def clip(leaves: list[Any]) -> list[Any]:
        if max_value is not None and any(map(jnp.iscomplexobj, leaves)):
            raise TypeError("clip_gradient: max_value has no meaning for x of complex arrays; use max_norm")
        return ClipGradientFunction.apply(leaves, max_value, max_norm)

    return map_floating_together("clip_gradient", clip, x)
