"""Roots of mean squares, and divisions by them, that overflow or underflow only where the result does.

    root = (mean(x²) + epsilon)^1/2,   x / root

In float32 a square overflows beyond 2⁶⁴ although its root does not, and is 0 below 2⁻⁷⁵; and the reciprocal of a root beyond 2¹²⁶ is subnormal, which
XLA takes for 0. So a mean square that is not finite, or so small that squares may be missing in it, is taken again of 2⁻⁹⁶ x or 2⁹⁶ x; and the
quotient is the product of x and two factors.

Reference: Blue, "A Portable Fortran Program to Find the Euclidean Norm of a Vector", 1978, for the scaled second sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.machine import on_accelerator
from layers.core.numerics import safe_reciprocal


def where_exact(root: Callable[[Any], Any], dtype: Any, epsilon: Any) -> Any:
    """`root(1.0)`, and `root(scale)` of another `scale` where that is not finite or has lost what `x` is made of.

    On a CPU the second is computed only where it is needed anywhere; an accelerator computes both in one pass, since it would wait for the answer.

    Args:
        root: from the factor of x, a number or an array of one for each root, to a tuple of arrays of one shape, all of x and not of its multiple.
            The last one, (mean(x²) + epsilon)^1/2, says where they are right.
        dtype: that of x.
        epsilon: is added to the mean square. Where it is known to outweigh all squares that are lost, it is not asked whether some are.
    """
    first = root(1.0)
    finite = jnp.isfinite(first[-1])
    scale = 2.0 ** (-3 * jnp.finfo(dtype).maxexp // 4)
    if outweighs_lost_squares(epsilon, dtype):
        both = lambda: jax.tree.map(lambda a, b: jnp.where(finite, a, b), first, root(scale))
        return both() if on_accelerator() else lax.cond(finite.all(), lambda: first, both)
    small = functools.reduce(jnp.logical_and, (jnp.abs(a) < 1 for a in first), first[-1] < _least_square(dtype) ** 0.5)
    scales = jnp.where(finite, jnp.where(small, 1 / scale, 1.0), scale).astype(first[-1].dtype)
    again = lambda: root(scales)
    return again() if on_accelerator() else lax.cond((scales == 1).all(), lambda: first, again)


def outweighs_lost_squares(epsilon: Any, dtype: Any) -> bool:
    """Whether `epsilon` is known while the program is traced, and so large that squares too small for the dtype are nothing beside it."""
    return not isinstance(epsilon, jax.Array) and epsilon >= _least_square(dtype)


def _least_square(dtype: Any) -> float:
    """The least mean square in which nothing is missing that matters."""
    return float(jnp.finfo(dtype).tiny) / float(jnp.finfo(dtype).eps)


def mean_root(mean_square: jax.Array, epsilon: Any, scale: Any) -> jax.Array:
    """(mean_square / scale² + epsilon)^1/2 of a mean square of scale x; 0 for 0, with a finite derivative."""
    total = mean_square + jnp.asarray(epsilon, mean_square.dtype) * scale * scale
    zero = total == 0
    root = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))
    if isinstance(scale, float) and scale == 1.0:
        return root
    return jnp.minimum(root / scale, jnp.finfo(root.dtype).max)  # rounding may lift it above the largest entry


def reciprocal_factors(root: jax.Array) -> tuple[float, jax.Array]:
    """Two factors of 1 / root, the second 0 for 0. Neither is subnormal for any root, as 1 / root is for the largest."""
    return 0.25, safe_reciprocal(root * 0.25)
