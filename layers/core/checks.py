"""What public functions and constructors ask of their arguments: each argument is stated once, at the door, by one of these words.

Every word takes who asks, the name of the argument and its value, and returns the value in the form in which rules take it. A value that does not
fit is a TypeError (of another type) or a ValueError (out of range, of another shape) that reads "who: argument is X, but must be Y: the likely fix".

    x = checks.array("rms_norm", "x", x)
    scale = checks.array("rms_norm", "scale", scale, optional=True)
    epsilon = checks.number("rms_norm", "epsilon", epsilon, "[0, inf)", traced=True)
    checks.shape("rms_norm", "scale", scale, x.shape[-1:], "(features,)", x=x)
"""

from __future__ import annotations

import inspect
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from layers.core import compat
from layers.core.intervals import in_words, lies
from layers.core.readings import KINDS, Kind, as_array, as_float, plain_number, scalar, shown


def array(who: str, what: str, value: Any, kind: Kind = "floating", *, ndim: int | None = None, optional: bool = False) -> Any:
    """A JAX array of this kind, of `ndim` axes where that is given; None stays None where the argument is `optional`."""
    if value is None and optional:
        return None
    x = as_array(who, what, value)
    dtypes, phrase = KINDS[kind]
    if not any(jnp.issubdtype(x.dtype, d) for d in dtypes):
        raise TypeError(f"{who}: {what} is of dtype {x.dtype}, but must be {phrase.format(what)}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{who}: {what} has shape {x.shape}, but must have {ndim} {'axis' if ndim == 1 else 'axes'}")
    return x


def shape(who: str, what: str, x: Any, sizes: Sequence[Any], axes: str, /, hint: str = "", **beside: Any) -> None:
    """Raises ValueError unless `x`, where it is not None, is of this shape; `axes` names them, `beside` are the arrays that it comes from."""
    if x is not None and tuple(x.shape) != tuple(sizes):
        others = ", ".join(f"{key}: {a.shape}" for key, a in beside.items() if a is not None)
        raise ValueError(f"{who}: {what} has shape {x.shape}, but must be {axes} = {tuple(sizes)}{f' ({others})' if others else ''}{hint}")


def number(who: str, what: str, value: Any, within: str = "(-inf, inf)", *, traced: bool = False, optional: bool = False) -> Any:
    """A real number in the interval `within`, such as "[0, 1)"; NaN lies in none, and infinity only in one that is closed there.

    Where it may be `traced` it may be any array without axes, whose range is not looked at if it is traced, and which stays an array.
    """
    if value is None and optional:
        return None
    value = scalar(who, what, value, f"a number {in_words(within)}", traced)
    if isinstance(value, compat.Tracer):
        if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
            raise TypeError(f"{who}: {what} is traced and of dtype {value.dtype}, but must be a real number")
        return value
    plain = plain_number(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{who}: {what} is {shown(value)}, but must be a number {in_words(within)}")
    plain = as_float(plain)
    if not lies(plain, within):
        raise ValueError(f"{who}: {what} is {shown(value)}, but must be a number {in_words(within)}")
    return value if traced and isinstance(value, jax.Array) else plain


def integer(who: str, what: str, value: Any, within: str = "(-inf, inf)", *, traced: bool = False, optional: bool = False) -> Any:
    """A whole number of at most 64 bits in the interval `within`, such as "[1, inf)"; a symbolic size of `jax.export` is one."""
    if value is None and optional:
        return None
    if is_symbolic_dim(cast(Any, value)):
        return value
    value = scalar(who, what, value, f"a whole number {in_words(within)}", traced)
    if isinstance(value, compat.Tracer):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{who}: {what} is traced and of dtype {value.dtype}, but must be a whole number")
        return value
    plain = plain_number(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral):
        raise TypeError(f"{who}: {what} is {shown(value)}, but must be a whole number {in_words(within)}")
    if not lies(plain, within) or not -(2**63) <= int(plain) < 2**63:
        raise ValueError(f"{who}: {what} is {shown(value)}, but must be a whole number {in_words(within)}, of at most 64 bits")
    return value if traced and isinstance(value, jax.Array) else operator.index(plain)


def flag(who: str, what: str, value: Any, *, optional: bool = False) -> Any:
    """True or False; NumPy's, and 0 and 1, are as good."""
    if value is None and optional:
        return None
    plain = plain_number(scalar(who, what, value, "True or False", traced=False))
    if isinstance(plain, bool) or (isinstance(plain, int) and plain in (0, 1)):
        return bool(plain)
    raise TypeError(f"{who}: {what} is {shown(value)}, but must be True or False")


def choice(who: str, what: str, value: Any, options: Iterable[Any]) -> Any:
    """One of `options`, which are strings or None."""
    options = tuple(options)
    if (value is None and None in options) or (isinstance(value, str) and value in options):
        return value
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{who}: {what} is {shown(value)}, but must be one of {', '.join(map(repr, options))}")


def function(who: str, what: str, value: Any, *, optional: bool = False) -> Any:
    """What can be called."""
    if callable(value) or (value is None and optional):
        return value
    raise TypeError(f"{who}: {what} is {shown(value)}, but must be a function")


def axis(who: str, what: str, value: Any, ndim: int, *, optional: bool = False) -> Any:
    """An axis of an array of `ndim` axes, counted from the front."""
    if value is None and optional:
        return None
    found = integer(who, what, value)
    if not -ndim <= found < ndim:
        raise ValueError(f"{who}: {what} is {found}, but must be an axis of an array that has {ndim}")
    return found % ndim


def axes(who: str, what: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Different axes of an array of `ndim` axes, or one, counted from the front."""
    found = tuple(axis(who, what, a, ndim) for a in several(value))
    if len(set(found)) < len(found):
        raise ValueError(f"{who}: {what} is {value}, but must name each axis once (of {ndim})")
    return found


def dtype(who: str, what: str, value: Any, kind: Kind = "floating", *, optional: bool = True) -> Any:
    """A dtype of this kind, or what names one; None stays None where the argument is `optional`."""
    if value is None and optional:
        return None
    dtypes, phrase = KINDS[kind]
    phrase = phrase.partition(":")[0].removeprefix("of ").removeprefix("a ")
    try:
        found = jnp.dtype(value) if value is not None else None
    except TypeError:
        found = None
    if found is None or not any(jnp.issubdtype(found, d) for d in dtypes):
        raise TypeError(f"{who}: {what} is {shown(value)}, but must be a {phrase}")
    return found


def key(who: str, what: str, value: Any, *, optional: bool = False) -> Any:
    """One typed key: of a key of `jax.random`, typed or as its words, or of an integer seed."""
    if value is None and optional:
        return None
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return jax.random.key(integer(who, what, value, f"[{-(2**63)}, {2**63})"))
    try:
        found = as_array(who, what, value)
    except TypeError:
        raise TypeError(f"{who}: {what} is {shown(value)}, but must be a key: jax.random.key(seed)") from None
    if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        if found.ndim == 0 and jnp.issubdtype(found.dtype, jnp.integer):
            return jax.random.key(found)
        if found.dtype != jnp.uint32:
            raise TypeError(f"{who}: {what} is {shown(found)}, but must be a key: jax.random.key(seed)")
        try:
            found = jax.random.wrap_key_data(found)
        except (TypeError, ValueError):
            raise ValueError(f"{who}: {what} has shape {found.shape}, which no key's words have: jax.random.key(seed)") from None
    if found.ndim:
        raise ValueError(f"{who}: {what} has shape {found.shape}, but must be one key: jax.vmap over an array of keys")
    return found


def arguments(who: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `fn` by name, with its defaults: of a constructor that passes on what it was given."""
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{who}: {error}") from None
    bound.apply_defaults()
    return bound.arguments


def mesh_axes(who: str, what: str, value: Any) -> tuple[str, ...]:
    """The names of mapped axes (of `jax.shard_map` or `jax.vmap`) that are there where this is called: of one name, several or None."""
    given = () if value is None else several(value)
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"{who}: {what} is {shown(value)}, but must be the name of a mesh axis, a tuple of names, or None")
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"{who}: {what} is {name!r}, but no axis of that name is mapped here: call it inside jax.shard_map or jax.vmap"
            ) from None
    return given


def indices(who: str, what: str, value: Any, count: int) -> list[int]:
    """The places of arguments, of which there are `count`, counted from the front: of one, several, or None for all."""
    given = range(count) if value is None else several(value)
    found = [integer(who, what, place) for place in given]
    for place in found:
        if not -count <= place < count:
            there = "is 1" if count == 1 else f"are {count}"
            raise ValueError(f"{who}: {what} names argument {place}, but there {there}: it must lie from {-count} to {count - 1}")
    return [place % count for place in found]


def several(value: Any) -> tuple[Any, ...]:
    """What is given where one or several may be, as a tuple; a string is one."""
    single = isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    return (value,) if single else tuple(value)
