"""Roots of mean squares, and divisions by them, that overflow or underflow only where the result does.

    root = (mean(x²) + epsilon)^1/2,   x / root

A square overflows beyond 2⁶⁴ in float32 although its root does not; and the reciprocal of a root beyond 2¹²⁶ is subnormal, which XLA takes for 0.
So a mean square that is not finite is taken again of 2⁻⁹⁶ x, and the quotient is the product of x and two factors.

Reference: Blue, "A Portable Fortran Program to Find the Euclidean Norm of a Vector", 1978, for the scaled second sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.machine import on_accelerator
from layers.core.numerics import safe_reciprocal


def where_finite(root: Callable[[float], Any], dtype: Any) -> Any:
    """`root(1.0)`, and `root(scale)` with a small `scale` where that is not finite.

    On a CPU the second is computed only where it is needed anywhere; an accelerator computes both in one pass, since it would wait for the answer.

    Args:
        root: from the factor of x to a tuple of arrays of one shape, all of x and not of its multiple. The last one says where they are finite.
        dtype: that of x.
    """
    first = root(1.0)
    finite = jnp.isfinite(first[-1])
    scale = 2.0 ** (-3 * jnp.finfo(dtype).maxexp // 4)

    def both() -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), first, root(scale))

    return both() if on_accelerator() else lax.cond(finite.all(), lambda: first, both)


def mean_root(mean_square: jax.Array, epsilon: Any, scale: float) -> jax.Array:
    """(mean_square / scale² + epsilon)^1/2 of a mean square of scale x; 0 for 0, with a finite derivative."""
    total = mean_square + jnp.asarray(epsilon, mean_square.dtype) * (scale * scale)
    zero = total == 0
    root = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))
    return root if scale == 1.0 else jnp.minimum(root / scale, jnp.finfo(root.dtype).max)  # rounding may lift it above the largest entry


def reciprocal_factors(root: jax.Array) -> tuple[float, jax.Array]:
    """Two factors of 1 / root, the second 0 for 0. Neither is subnormal for any root, as 1 / root is for the largest."""
    return 0.25, safe_reciprocal(root * 0.25)
