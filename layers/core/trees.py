"""Leaves of pytrees: which are arrays, and layers applied to the floating-point ones, one by one or together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import checks, compat


def is_array(x: Any) -> bool:
    """Whether `x` is traced and differentiated as an array: JAX arrays and tracers, NumPy arrays and scalars."""
    return isinstance(x, (compat.Tracer, np.ndarray, np.generic, jax.Array))


def is_number(x: Any) -> bool:
    """Whether `x` is a Python number, which is as good as an array; a bool is an option."""
    return isinstance(x, (int, float, complex)) and not isinstance(x, bool)


def is_inexact(x: Any) -> bool:
    """Whether an array, or what stands for one, is of a floating-point or complex dtype."""
    return jnp.issubdtype(x.dtype, np.inexact)


def kind_of(x: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of an array, or of what stands for one."""
    return x.shape, x.dtype


def replaced(leaves: Iterable[Any], indices: Iterable[int], values: Iterable[Any]) -> list[Any]:
    """The list of `leaves` with one of `values` at each of `indices`."""
    now = list(leaves)
    for i, x in zip(indices, values, strict=True):
        now[i] = x
    return now


def map_floating(name: str, fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` of every floating-point or complex leaf; other leaves as they are.

    Raises:
        TypeError: for a leaf that is no array and no number, and where there is none.
    """
    return map_floating_together(name, lambda leaves: [fn(x) for x in leaves], tree)


def map_floating_together(name: str, fn: Callable[[list[Any]], list[Any]], tree: Any) -> Any:
    """The same, where `fn` takes and returns the list of all such leaves."""
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        raise TypeError(f"{name}: x is {checks.shown(tree)}, but must be an array or a pytree of arrays")
    for x in leaves:
        if not (is_array(x) or isinstance(x, (bool, int, float, complex))):
            raise TypeError(f"{name}: x holds a {type(x).__name__}, but must be an array or a pytree of arrays")
    indices = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), np.inexact)]
    return structure.unflatten(replaced(leaves, indices, fn([jnp.asarray(leaves[i]) for i in indices])))
