"""Quantisation to a grid of integers and back, for training that knows of it.

    n, p = -2^(bits-1), 2^(bits-1) - 1 (signed) or 0, 2^bits - 1;   u = x / s,   q = round(clip(u, n, p))
Forward   y = s q
Backward  dx = dy where n < u < p, else 0                       (straight through the rounding, clipped)
          ds = g sum dy (q - u where inside, else q)            (learned step, LSQ);   g = 1 / sqrt(N p)

For an entry inside, y = s round(x / s), so dy/ds = q - u with the rounding passed straight through; for one clipped it is q, n or p itself.
N is the number of entries that share a step, and g is LSQ's scale of its gradient.
Saved     x and s; the quotient is recomputed.

With no step given, s = max|x| / p, without gradient. Then no u lies above p but by rounding, and nothing is clipped there: dx = dy.

Reference: Esser et al., "Learned Step Size Quantization", 2020, equations 1 to 5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.numerics import safe_reciprocal, wide
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.quantization.scales import scale_to


def _levels(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _quotient(x: jax.Array, step: jax.Array) -> jax.Array:
    x, step = x.astype(wide(x.dtype)), step.astype(wide(x.dtype))
    part = jnp.where(step > 1, 0.25, 1).astype(step.dtype)  # the reciprocal of the largest steps is subnormal, which XLA takes for 0
    return (x * part) * safe_reciprocal(step * part)


class FakeQuantizeFunction(Function):
    @staticmethod
    def forward(ctx, x, step, bits, signed, absmax=False):
        ctx.save_for_backward(x, step)
        ctx.levels = low, high = _levels(bits, signed)
        ctx.absmax = absmax
        quantised = jnp.round(jnp.clip(_quotient(x, step), low, high))
        return (quantised * step.astype(quantised.dtype)).astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, step), dy = barrier(ctx.saved_tensors, dy)
        low, high = ctx.levels
        u = _quotient(x, step)
        inside = u >= low if ctx.absmax else (u > low) & (u < high)
        dx = jnp.where(inside, dy, 0)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        q = jnp.round(jnp.clip(u, low, high))
        g = 1 / jnp.sqrt(jnp.asarray(x.size // step.size, u.dtype) * high)
        return dx, g * dy.astype(u.dtype) * (q - jnp.where(inside, u, 0)), None, None, None

    @staticmethod
    def surrogate(x, step, bits, signed, absmax=False):
        low, high = _levels(bits, signed)
        hold = jax.lax.stop_gradient
        u = hold(x / step)
        inside = u >= low if absmax else (u > low) & (u < high)
        slope = hold(jnp.round(jnp.clip(u, low, high)) - jnp.where(inside, u, 0))
        return jnp.where(inside, x, 0) + slope * step / (x.size // step.size * high) ** 0.5

    @staticmethod
    def example(key, dtype):
        return 2 * jax.random.normal(key, (3, 5), dtype), jnp.asarray([[0.3], [0.2], [0.5]], dtype), 4, True

    @staticmethod
    def examples(key, dtype):
        x, step, bits, _ = FakeQuantizeFunction.example(key, dtype)
        return {
            "not signed": (x, step, bits, False),
            "steps of the largest": (x, step, bits, True, True),
            "far out": (1e4 * x, step, bits, True),
            "infinite": (jnp.array([[jnp.inf, -jnp.inf, 1.0]], dtype), step[:1], bits, True),
            "no rows": (x[:0], step[:1], bits, True),
        }


def fake_quantize(
    x: Float[Array, "*shape"],
    step: Float[Array, "..."] | None = None,
    *,
    bits: int = 8,
    axis: int | None = None,
    signed: bool = True,
) -> Float[Array, "*shape"]:
    """Rounds `x` to a grid of `2**bits` levels, with a straight-through gradient.

    Args:
        x: values of any shape.
        step: the distance of the levels, a scalar, or a vector with one entry for each index of `axis`; it is differentiated (LSQ).
            None takes the absolute maximum over the highest level, without gradient.
        bits: 2 to 32 for signed, 1 to 32 for unsigned levels.
        axis: the channel axis, with a step for each index; None for one step.
        signed: levels -2^(bits-1) to 2^(bits-1) - 1, else 0 to 2^bits - 1.

    Returns:
        An array of the shape and dtype of `x`. A step of 0 gives zeros, and finite gradients.

    Raises:
        TypeError: where `x` or `step` is not of a floating-point dtype, or an option not of its type.
        ValueError: for too few or too many bits, an `axis` that `x` has not, or a `step` of another shape.

    Reference: Esser et al., "Learned Step Size Quantization", 2020.
    """
    x = checks.array("fake_quantize", "x", x)
    step = checks.array("fake_quantize", "step", step, optional=True)
    signed = checks.flag("fake_quantize", "signed", signed)
    bits = checks.integer("fake_quantize", "bits", bits, "[2, 32]" if signed else "[1, 32]")
    axis = checks.axis("fake_quantize", "axis", axis, x.ndim, optional=True)
    checks.shape("fake_quantize", "step", step, () if axis is None else (x.shape[axis],), f"one for each index of axis {axis}", x=x)
    if not x.size:
        return x
    spread = () if axis is None else tuple(-1 if i == axis else 1 for i in range(x.ndim))
    absmax = step is None
    if step is None:
        others = tuple(i for i in range(x.ndim) if i != axis)
        high = _levels(bits, signed)[1]
        step = jax.lax.stop_gradient(scale_to(high, jnp.max(jnp.abs(x), axis=others).astype(wide(x.dtype))))
    return FakeQuantizeFunction.apply(x, step.reshape(spread), bits, signed, absmax=absmax)
