"""Finite scalar quantisation: each channel bounded and rounded to a few levels.

    h = (L - 1) (1 + eps) / 2;   o = 0 for L odd, 1/2 for L even;   eps = min(1/1000, 1 / 2(L - 1)): b is never rounded beyond a level
    t = tanh(x + s),   b = h t - o,   q = round(b)
Forward   y = q / (L // 2)
Backward  dx = dy h (1 - t^2) / (L // 2)      (straight through the rounding)

The shift s = atanh(o / h) puts x = 0 on the level 0, which for L = 2 is the upper one: of normal x one in 10000 would take the lower. So for two
levels s = 0, and they meet at x = 0.
Saved     x.

Reference: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023, appendix A.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.quantization.finite_scalar_codes import check_levels, index_of

_EPSILON = 1e-3


def _bounds(levels: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h, o and s of each channel."""
    count = np.asarray(levels)
    half = (count - 1) / 2 + np.minimum((count - 1) * _EPSILON / 2, 0.25)
    offset = np.where(count % 2 == 0, 0.5, 0.0)
    shift = np.where(count == 2, 0.0, np.arctanh(offset / half))
    return tuple(jnp.asarray(v, dtype) for v in (half, offset, shift))  # type: ignore[return-value]


class FiniteScalarQuantizeFunction(Function):
    @staticmethod
    def forward(ctx, x, levels):
        ctx.save_for_backward(x)
        ctx.levels = levels
        half, offset, shift = _bounds(levels, wide(x.dtype))
        bounded = half * jnp.tanh(x.astype(half.dtype) + shift) - offset
        return (jnp.round(bounded) / (np.asarray(levels) // 2)).astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,), dy = barrier(ctx.saved_tensors, dy)
        half, _, shift = _bounds(ctx.levels, wide(x.dtype))
        t = jnp.tanh(x.astype(half.dtype) + shift)
        return dy * half * (1 - t * t) / (np.asarray(ctx.levels) // 2), None

    @staticmethod
    def surrogate(x, levels):
        half, offset, shift = _bounds(levels, wide(x.dtype))
        return (half * jnp.tanh(x + shift) - offset) / (np.asarray(levels) // 2)

    @staticmethod
    def example(key, dtype):
        return 2 * jax.random.normal(key, (4, 3), dtype), (8, 5, 3)

    @staticmethod
    def examples(key, dtype):
        x, levels = FiniteScalarQuantizeFunction.example(key, dtype)
        return {
            "two levels": (x, (2, 4, 6)),
            "far out": (1e4 * x, levels),
            "infinite": (x.at[0].set(jnp.inf), levels),
            "no rows": (x[:0], levels),
        }


def finite_scalar_quantize(x: Float[Array, "*batch channels"], levels: Sequence[int]) -> tuple[Float[Array, "*batch channels"], Int[Array, "*batch"]]:
    """Bounds each channel and rounds it to one of its levels, in [-1, 1]; the gradient goes straight through the rounding.

    Args:
        x: features.
        levels: the number of levels of each channel, 2 or more; their product is the size of the codebook.

    Returns:
        The quantised features, and the index of each vector in the codebook (int32, first channel fastest), as `finite_scalar_indices`
        gives it; `finite_scalar_codes` goes back. A channel that is NaN stays NaN, and counts as level 0 in the index.

    Raises:
        ValueError: if `levels` has not one entry for each channel, an entry is below 2 or more than the dtype can tell apart, or the codebook
            does not fit an int32.
        TypeError: where `x` is not of a floating-point dtype.

    Reference: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023.
    """
    x = checks.array("finite_scalar_quantize", "x", x)
    levels = check_levels("finite_scalar_quantize", levels, x)
    if max(levels, default=2) // 2 * float(jnp.finfo(x.dtype).eps) > 1:
        raise ValueError(f"finite_scalar_quantize: {x.dtype} cannot tell {max(levels)} levels apart: cast x, x.astype('float32')")
    y = FiniteScalarQuantizeFunction.apply(x, levels)
    return y, index_of(jax.lax.stop_gradient(y), levels)
