"""Operations on known arrays, by NumPy where that gives JAX's values to the bit: JAX would compile a program for each.

These are moves, comparisons, selections, booleans and integers, and the arithmetic that IEEE 754 rounds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import compat
from layers.rewriting.graph import Node

Fold = Callable[..., Any]


def fold(n: Node, args: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of an operation of arrays that are known."""
    rule = _RULES.get(n.name)
    made = rule(n, *args) if rule is not None else None
    if made is not None:
        return [np.asarray(made, n.out.dtype)]
    with jax.ensure_compile_time_eval():
        return [np.asarray(x) for x in compat.evaluate(n.eqn, [jnp.asarray(a, v.dtype) for a, v in zip(args, n.inputs, strict=True)])]


def _elementwise(ufunc: Fold) -> Fold:
    def rule(n: Node, *args: np.ndarray) -> Any:
        with np.errstate(all="ignore"):
            return ufunc(*args)

    return rule


def _iota(n: Node) -> np.ndarray:
    shape, axis = n.out.shape, n.params["dimension"]
    along = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(along, shape)


def _broadcast(n: Node, x: np.ndarray) -> np.ndarray:
    at = n.params["broadcast_dimensions"]
    lengths = dict(zip(at, x.shape, strict=True))
    return np.broadcast_to(x.reshape([lengths.get(i, 1) for i in range(n.out.ndim)]), n.out.shape)


def _cast(n: Node, x: np.ndarray) -> np.ndarray | None:
    """NumPy and XLA disagree on floating-point numbers that no integer is."""
    narrows = jnp.issubdtype(x.dtype, jnp.inexact) and not jnp.issubdtype(n.out.dtype, jnp.inexact)
    return None if narrows or jnp.issubdtype(x.dtype, jnp.complexfloating) else x.astype(n.out.dtype)


def _divide(n: Node, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    with np.errstate(all="ignore"):
        return x / y


def _slice(n: Node, x: np.ndarray) -> np.ndarray:
    p = n.params
    steps = p["strides"] or (1,) * x.ndim
    return x[tuple(slice(*bounds) for bounds in zip(p["start_indices"], p["limit_indices"], steps, strict=True))]


def _select(n: Node, which: np.ndarray, *cases: np.ndarray) -> np.ndarray | None:
    return np.where(which, cases[1], cases[0]) if which.dtype == bool else None


def _laid_out(n: Node, x: np.ndarray) -> np.ndarray:
    return x.reshape(n.out.shape)


_UFUNCS = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "is_finite": np.isfinite,
}
_RULES: dict[str, Fold] = {
    **{name: _elementwise(ufunc) for name, ufunc in _UFUNCS.items()},
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "reshape": _laid_out,
    "squeeze": _laid_out,
    "expand_dims": _laid_out,
    "transpose": lambda n, x: x.transpose(n.params["permutation"]),
    "convert_element_type": _cast,
    "div": _divide,
    "slice": _slice,
    "select_n": _select,
    "concatenate": lambda n, *xs: np.concatenate(xs, n.params["dimension"]),
    "stop_gradient": lambda n, x: x,
    "copy": lambda n, x: x,
}
