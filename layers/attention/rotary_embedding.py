"""Rotary position embedding: each pair of features is rotated by an angle in proportion to its position.

    angle_i = position base^(-2 i / rotated),   y_a = x_a cos - x_b sin,   y_b = x_b cos + x_a sin

for the pairs (a, b) = (i, i + rotated / 2), or (2 i, 2 i + 1) where interleaved. A rotation's transpose is the rotation back:

    dx = y with dy for x and -angle for angle

Saved: the positions. Cosines and sines, one table for all heads, are computed again; where XLA finds that it has them already, it may keep them.

Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core.checks import check_floating
from layers.core.function import Function
from layers.core.numerics import wide


class RotaryEmbeddingFunction(Function):
    @staticmethod
    def forward(ctx, x, positions, base, rotated, interleaved):
        ctx.save_for_backward(positions)
        ctx.base, ctx.rotated, ctx.interleaved = base, rotated, interleaved
        return _rotate(x, positions, base, rotated, interleaved, 1)

    @staticmethod
    def backward(ctx, dy):
        (positions,) = ctx.saved_tensors
        return _rotate(dy, positions, ctx.base, ctx.rotated, ctx.interleaved, -1), None, None, None, None

    @staticmethod
    def example(key, dtype):
        return jax.random.normal(key, (2, 3, 2, 6), dtype), jnp.array([[0, 1, 5], [3, 0, 2]]), 100.0, 4, False


def _rotate(x: jax.Array, positions: jax.Array, base: float, rotated: int, interleaved: bool, sign: int) -> jax.Array:
    dtype = wide(x.dtype)
    angle = positions[..., None, None].astype(dtype) * base ** (-jnp.arange(0, rotated, 2, dtype=dtype) / rotated)
    cos, sin = jnp.cos(angle), jnp.sin(angle) * sign
    if interleaved:
        pairs = x[..., :rotated].reshape(*x.shape[:-1], rotated // 2, 2).astype(dtype)
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        a, b = x[..., : rotated // 2].astype(dtype), x[..., rotated // 2 : rotated].astype(dtype)
    sides = ((a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype))
    y = (jnp.stack(sides, -1).reshape(*x.shape[:-1], rotated),) if interleaved else sides
    return jnp.concatenate([*y, x[..., rotated:]], -1)


def rotary_embedding(
    x: Float[Array, "*batch time heads head_dim"],
    positions: Int[Array, "*#batch time"] | None = None,
    *,
    base: float = 10_000.0,
    rotated_features: int | None = None,
    interleaved: bool = False,
) -> Float[Array, "*batch time heads head_dim"]:
    """Rotates pairs of features by an angle in proportion to the position.

    Args:
        x: queries or keys.
        positions: of each step of time, for all batch elements or for each; None for 0, 1, ...; no gradient goes to them.
        base: the longest period is 2 π base.
        rotated_features: how many features are rotated, the first ones; None for all.
        interleaved: whether pairs are neighbours, (0, 1), (2, 3), ...; else each half of the features is one side.

    Returns:
        An array of the shape and dtype of `x`; angles are of float32 or wider.

    Raises:
        ValueError: where `positions` does not fit `x`, or the number of rotated features is odd or too large.
        TypeError: where `x` is not of a floating-point dtype.
    """
    x = jnp.asarray(x)
    check_floating("rotary_embedding", x=x)
    if x.ndim < 3:
        raise ValueError(f"rotary_embedding: x has shape {x.shape}, but must be (*batch, time, heads, head_dim)")
    rotated = x.shape[-1] if rotated_features is None else rotated_features
    if rotated % 2 or not 0 <= rotated <= x.shape[-1]:
        raise ValueError(f"rotary_embedding: {rotated} features are to be rotated, but it must be an even number up to {x.shape[-1]} (x: {x.shape})")
    positions = _positions(positions, x)
    return x if not rotated else RotaryEmbeddingFunction.apply(x, positions, float(base), rotated, interleaved)


def _positions(positions: Any, x: jax.Array) -> jax.Array:
    steps = x.shape[:-2]
    positions = jnp.arange(steps[-1], dtype=jnp.int32) if positions is None else jax.lax.stop_gradient(jnp.asarray(positions))
    full = (1,) * (len(steps) - positions.ndim) + positions.shape
    if len(full) != len(steps) or full[-1] != steps[-1] or any(n not in (1, m) for n, m in zip(full, steps, strict=True)):
        raise ValueError(f"rotary_embedding: positions have shape {positions.shape}, but must fit (*batch, time) = {steps} of x {x.shape}")
    return positions
