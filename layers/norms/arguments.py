"""What the normalisations ask of their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes

from layers.core import checks
from layers.core.numerics import is_known, with_offset
from layers.norms.statistics import Over


def rows(who: str, x: Any, epsilon: Any, **parameters: Any) -> tuple[Any, ...]:
    """`x`, the parameters, each None or of the size of the last axis of `x`, and epsilon, of a function."""
    x = checks.array(who, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{who}: x is a scalar, but must have a last axis of features: x[None]")
    parameters = {what: checks.array(who, what, value, "real", optional=True) for what, value in parameters.items()}
    for what, value in parameters.items():
        checks.shape(who, what, value, x.shape[-1:], "(features,)", x=x)
    return x, *parameters.values(), checks.number(who, "epsilon", epsilon, "[0, inf)", traced=True)


def sums(who: str, x: Any, residual: Any, epsilon: Any, **parameters: Any) -> tuple[Any, ...]:
    """The same, with a residual that can be added without broadcasting."""
    x, *others = rows(who, x, epsilon, **parameters)
    residual = checks.array(who, "residual", residual)
    checks.shape(who, "residual", residual, x.shape, "the shape of x", hint=": broadcast one to the other")
    return x, residual, *others


def scale_and_offset(who: str, scale: Any, value: Any) -> tuple[Any, float]:
    """The scale, if there is one, and what is to be added to it: an array already is, and has its gradient there."""
    value = checks.number(who, "scale_offset", value, traced=True)
    if scale is None and not is_known(value, 0):
        raise ValueError(f"{who}: scale_offset is {checks.shown(value)}, but there is no scale to add it to")
    return with_offset(scale, value)


def _axes(who: str, what: str, value: Any) -> Any:
    """Axes of an array that is not there yet."""
    for axis in value if isinstance(value, (tuple, list)) else () if value is None else (value,):
        checks.integer(who, what, axis)
    return value


def _names(who: str, what: str, value: Any) -> Any:
    names = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{who}: {what} is {checks.shown(value)}, but must be the name of a mesh axis, a tuple of names, or None")
    return value


_OPTIONS: dict[str, Callable[[str, str, Any], Any]] = {
    "num_features": functools.partial(checks.integer, within="[1, 2147483647]"),
    "num_groups": functools.partial(checks.integer, within="[1, 2147483647]", optional=True),
    "group_size": functools.partial(checks.integer, within="[1, 2147483647]", optional=True),
    "epsilon": functools.partial(checks.number, within="[0, inf)", traced=True),
    "momentum": functools.partial(checks.number, within="[0, 1]", traced=True),
    "axis": _axes,
    "reduction_axes": _axes,
    "feature_axes": _axes,
    "axis_name": _names,
    "dtype": checks.dtype,
    "param_dtype": functools.partial(checks.dtype, optional=False),
    "use_bias": checks.flag,
    "use_scale": checks.flag,
    "use_fast_variance": checks.flag,
    "use_running_average": functools.partial(checks.flag, optional=True),
    "bias_init": checks.function,
    "scale_init": checks.function,
    "promote_dtype": checks.function,
}
"""What each option of a module has to be; what is missing here is passed on as it is."""


def options(who: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor of Flax by name, in which every option is what it has to be."""
    given = checks.arguments(who, fn, args, kwargs)
    for what in given.keys() & _OPTIONS.keys():
        given[what] = _OPTIONS[what](who, what, given[what])
    return given


def with_option(module: type, name: str, default: Any) -> inspect.Signature:
    """The signature of the constructor of a Flax module with one more option."""
    signature = inspect.signature(module.__init__)
    return signature.replace(parameters=[*signature.parameters.values(), inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)])


def promoted(module: Any, x: Any, *parameters: Any) -> tuple[Any, list[Any], Any]:
    """The input and the parameters of a module, and the dtype it computes in.

    Flax's own promotion is left to the layer, so that the arrays kept for backward are those that are alive anyway.
    """
    who = type(module).__name__
    x = checks.array(who, "x", x, "any real")
    if x.ndim == 0:
        raise ValueError(f"{who}: x is a scalar, but must have an axis of features: x[None]")
    values = [None if p is None else p[...] for p in parameters]
    if module.promote_dtype is not dtypes.promote_dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        x, *values = module.promote_dtype((x, *values), dtype=module.dtype)
    dtype = dtypes.canonicalize_dtype(x, *values, dtype=module.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{who}: x and the parameters make {dtype}, but a real floating-point dtype is needed: use Flax's own")
    return x, values, dtype


def along(module: Any, x: jax.Array, feature_axes: Any, *parameters: Any) -> list[Any]:
    """The parameters reshaped to broadcast against x along its feature axes."""
    who = type(module).__name__
    axes = from_the_end(who, "feature_axes", feature_axes, x.ndim)
    shape = [x.shape[a] if a in axes else 1 for a in range(min(axes), 0)]
    if any(p is not None and p.size != _product(shape) for p in parameters):
        raise ValueError(f"{who}: x has shape {x.shape}, but must have num_features = {module.num_features} along its axis {feature_axes}")
    return [None if p is None else p.reshape(shape) for p in parameters]


def masked(module: Any, x: jax.Array, mask: Any) -> Any:
    """A mask that broadcasts to x; None stays None."""
    who = type(module).__name__
    mask = checks.array(who, "mask", mask, "mask", optional=True)
    if mask is not None and (mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False))):
        raise ValueError(f"{who}: mask has shape {mask.shape}, but must broadcast to that of x, {x.shape}")
    return mask


def over(module: Any, ndim: int, axes: Any) -> Over:
    """The statistics that a module asks for."""
    who = type(module).__name__
    checks.mesh_axes(who, "axis_name", module.axis_name)
    groups = None if module.axis_index_groups is None else tuple(tuple(g) for g in module.axis_index_groups)
    return Over(from_the_end(who, "reduction_axes", axes, ndim), module.axis_name, groups, bool(module.use_fast_variance))


def from_the_end(who: str, what: str, axes: Any, ndim: int) -> tuple[int, ...]:
    """Axes as sorted negative numbers."""
    given = tuple(axes) if isinstance(axes, (tuple, list, range)) else (axes,)
    return tuple(sorted({checks.axis(who, what, a, ndim) - ndim for a in given}))


def _product(shape: list[Any]) -> Any:
    return functools.reduce(lambda a, b: a * b, shape, 1)
