"""Numbers of 8 bits with a floating point, as accelerators multiply them: rounding to them, and their products.

    E4M3   sign, 4 bits of exponent, 3 of mantissa: spacing 2^-9 below 2^-6, up to 448, NaN but no infinity      (`float8_e4m3fn`)
    E5M2   sign, 5 bits of exponent, 2 of mantissa: spacing 2^-16 below 2^-14, up to 57344                       (`float8_e5m2`)

Rounding is to the nearest, ties to even, once, from float32: XLA's conversion goes by way of float16 on some machines, which rounds twice. What is
larger than the largest number becomes that.

Products of two such numbers are exact in float32, in which they are added up. Where the machine has units for them, their operands stay as they are:
it takes only the direct form, 8 bits times 8 bits, for them. A CPU has none and multiplies the same numbers in float32.

Reference: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.machine import on_accelerator


class Format(NamedTuple):
    """A format, the bits of its mantissa and the largest and the least normal number."""

    dtype: Any
    mantissa: int
    largest: float
    least_normal: float


E4M3 = Format(jnp.float8_e4m3fn, 3, 448.0, 2.0**-6)
E5M2 = Format(jnp.float8_e5m2, 2, 57344.0, 2.0**-14)


def rounded(u: jax.Array, to: Format) -> jax.Array:
    """`u`, float32 or wider, in the format `to`."""
    u = jnp.clip(u, -to.largest, to.largest)
    spacing = to.least_normal / 2**to.mantissa
    bits = jnp.finfo(u.dtype).nexp
    normal = lax.reduce_precision(u, exponent_bits=bits, mantissa_bits=to.mantissa)
    return jnp.where(jnp.abs(u) < to.least_normal, jnp.round(u / spacing) * spacing, normal).astype(to.dtype)


def narrow_product(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """The product of two matrices of 8-bit numbers, contracted over one axis of each, added up in float32 and rounded to `dtype`."""
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    if on_accelerator():
        return lax.dot_general(a, b, contracted, preferred_element_type=dtype)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(a, b, contracted, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(dtype)
