"""Arithmetic that every layer's gradient needs: wide accumulation, products of matrices, division that cannot fail."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.core.machine import on_accelerator
from layers.core.products import einsum


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: float32, or the dtype itself where it is wider (complex64 at least for complex)."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of matrices, as `jnp.einsum` writes it: of operands of their common dtype, added up in float32 or wider."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=wide(dtype))


def hidden_dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`dot`, of what is only gone through once: on an accelerator the 16-bit product of 16-bit operands, rounded after it is added up."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    if wide(dtype) == dtype or not on_accelerator():
        return dot(spec, x, y)
    return einsum(spec, x.astype(dtype), y.astype(dtype)).astype(wide(dtype))


def scaled(q: jax.Array, scale: Any) -> tuple[jax.Array, float]:
    """Queries (batch, time, heads, features), and what is left to multiply their products by; a scale that is an array multiplies the queries."""
    if isinstance(scale, jax.Array):
        return q * scale.astype(q.dtype), 1.0
    return q, float(max(q.shape[3], 1) ** -0.5 if scale is None else scale or 0.0)


def is_known(x: Any, value: float) -> bool:
    """Whether an option that may be traced is this number, and known while the program is."""
    return not isinstance(x, jax.Array) and x == value


def with_offset(scale: Any, offset: Any) -> tuple[Any, Any]:
    """A scale and what is to be added to it; an offset that is an array already is."""
    if not isinstance(offset, jax.Array):
        return scale, offset
    dtype = wide(scale.dtype)
    return scale.astype(dtype) + offset.astype(dtype), 0.0


def cleared(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x, and 0 where weight is 0 and x infinite or NaN: what does not count is not touched."""
    return jnp.where((weight == 0) & ~jnp.isfinite(x), 0, x)


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight x, and 0 where weight is 0 and x infinite or NaN. The derivative by weight is x if it is finite."""
    return weight * cleared(x, weight)


def slope_along(gradient: jax.Array, tangent: jax.Array) -> jax.Array:
    """Σ gradient tangent, where 0 times anything is 0, on either side."""
    return product(cleared(tangent, gradient), gradient).sum()


def safe_reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is 0; its derivative is finite there too."""
    zero = x == 0
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, x))
