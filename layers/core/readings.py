"""How a value that was given is read: as an array, as a number, and in words for a message."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import compat

Kind = Literal["floating", "inexact", "real", "integer", "boolean", "mask", "any real", "number", "any"]
"""What an array is of: the dtypes of each and what messages say of them stand in `KINDS`."""

KINDS: dict[Kind, tuple[tuple[Any, ...], str]] = {
    "floating": ((jnp.floating,), "of a real floating-point dtype: cast it, {}.astype('float32')"),
    "inexact": ((jnp.inexact,), "of a floating-point or complex dtype: cast it, {}.astype('float32')"),
    "real": ((jnp.floating, jnp.integer), "of real numbers: cast it, {}.astype('float32')"),
    "integer": ((jnp.integer,), "of integers: cast it, {}.astype('int32')"),
    "boolean": ((jnp.bool_,), "of bool: compare, {} != 0"),
    "mask": ((jnp.bool_, jnp.integer, jnp.floating), "of bool, or of zeros and ones: compare, {} != 0"),
    "any real": ((jnp.bool_, jnp.floating, jnp.integer), "of real numbers: cast it, {}.astype('float32')"),
    "number": ((jnp.inexact, jnp.integer), "of numbers: cast it, {}.astype('float32')"),
    "any": ((jnp.inexact, jnp.integer, jnp.bool_), "of numbers or bool: cast it, {}.astype('float32')"),
}
"""The kinds of arrays: the dtypes that belong to each, and what messages say of them."""


def as_array(who: str, what: str, value: Any) -> jax.Array:
    """A JAX array of what is one, of numbers or of lists of them; else a TypeError."""
    if isinstance(value, jax.Array):
        return value
    leaves = jax.tree.leaves(value) if isinstance(value, (list, tuple)) else [value]
    try:
        if all(is_numeric(x) for x in leaves):
            return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        pass  # rows of unequal length, an array of objects
    raise TypeError(f"{who}: {what} is {shown(value)}, but must be an array")


def is_numeric(x: Any) -> bool:
    """Whether `x` is a number or an array, or says that it can be one."""
    if isinstance(x, (str, bytes)):  # NumPy's strings are str
        return False
    return isinstance(x, (jax.Array, np.ndarray, np.generic, numbers.Number)) or hasattr(x, "__jax_array__") or hasattr(x, "__array__")


def scalar(who: str, what: str, value: Any, kind: str, traced: bool) -> Any:
    """`value`, refused where it is traced and may not be, or an array that has axes."""
    if not isinstance(value, (jax.Array, np.ndarray)) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if isinstance(value, compat.Tracer) and not traced:
        raise TypeError(
            f"{who}: {what} is traced, but is part of the program: pass it as a Python value, through `static_argnames` where the call is "
            f"inside a jax.jit of which {what} is an argument"
        )
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        raise ValueError(f"{who}: {what} has shape {value.shape}, but must be {kind}")
    return value


def plain_number(value: Any) -> Any:
    """The Python number of an array without axes; anything else as it is."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return np.asarray(value).item()
    return value


def as_float(value: Any) -> float:
    """The float nearest to a number, infinity beyond all."""
    try:
        return float(value)
    except OverflowError:  # of a whole number beyond all floats
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """What messages say that an argument is: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = repr(value)
        return text if len(text) <= 60 else f"a {type(value).__name__} of {len(text)} characters"
    if isinstance(value, compat.Tracer):
        return f"a traced array {value.dtype}{list(value.shape)}"
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, (np.generic, np.ndarray, jax.Array)) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return str(np.asarray(value))
    if isinstance(value, (tuple, list)) and len(repr(value)) <= 60:
        return repr(value)
    return f"an object of type {type(value).__name__}"


def size(n: int) -> str:
    """A number of bytes, in the unit that suits it."""
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
