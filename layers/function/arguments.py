"""Pytrees with their arrays apart: what JAX traces on one side, any other Python object on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import compat
from layers.core.trees import is_array, is_number
from layers.function.closures import hoist, is_iterator
from layers.function.cotangents import CONSTANT, NOT_AN_ARRAY
from layers.function.structure import Skeleton, make_with_gaps


@dataclass(frozen=True)
class Template:
    """A pytree whose arrays are kept elsewhere: `leaves` holds the place of each array and every other leaf as it is."""

    tree: Any
    leaves: tuple[Any, ...]

    def fill(self, arrays: Sequence[Any]) -> Any:
        return self.tree.unflatten([x.fill(arrays) if isinstance(x, _Place) else x for x in self.leaves])

    def children(self) -> list[Template]:
        """A template for each part of a node."""
        return [Template(part.tree, part.marks) for part in Skeleton(self.tree, self.leaves).children()]

    def skeleton(self) -> Skeleton:
        """The structure, marked with the indices of arrays, `CONSTANT` and `NOT_AN_ARRAY`."""
        return Skeleton(self.tree, tuple(x.start if isinstance(x, ArrayPlace) else _mark(x) for x in self.leaves))

    def fill_with_gaps(self, arrays: Sequence[Any], avals: Sequence[Any]) -> Any:
        """The structure of `arrays`, some of them None, and None for what is no array; where a class refuses None, zeros and what stands there."""
        given = [arrays[x.start] if isinstance(x, ArrayPlace) else None for x in self.leaves]
        if all(x is not None for x in given):
            return self.tree.unflatten(given)
        stand_ins = [compat.zeros(avals[x.start]) if isinstance(x, ArrayPlace) and g is None else x for x, g in zip(self.leaves, given, strict=True)]
        return make_with_gaps(self.tree, given, stand_ins)


def _mark(leaf: Any) -> Any:
    return CONSTANT if is_number(leaf) or is_array(leaf) else NOT_AN_ARRAY


class _Place:
    def fill(self, arrays: Sequence[Any]) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class ArrayPlace(_Place):
    start: int

    def fill(self, arrays: Sequence[Any]) -> Any:
        return arrays[self.start]


@dataclass(frozen=True)
class CallablePlace(_Place):
    """A function whose traced closure is kept among the arrays."""

    start: int
    stop: int
    rebuild: Callable[[list[Any]], Any]

    def fill(self, arrays: Sequence[Any]) -> Any:
        return self.rebuild(list(arrays[self.start : self.stop]))


def take_apart(name: str, what: str, value: Any, arrays: list[Any], constants: list[Any] | None = None) -> Template:
    """Moves the arrays of a pytree to the end of `arrays`; what remains is static.

    So are the arrays among `constants`, where that is given, and NumPy's of booleans and integers, which it gets as arrays of JAX: such a mask or
    index is known while a program is traced, as it is without a `Function`.
    """
    leaves, tree = jax.tree.flatten(value, is_leaf=is_iterator)
    kept: list[Any] = []
    for leaf in leaves:
        if constants is not None and isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biu":
            with jax.ensure_compile_time_eval():
                leaf = jnp.asarray(leaf)
            constants.append(leaf)
        if constants and any(leaf is c for c in constants):
            kept.append(leaf)
        elif is_array(leaf):
            kept.append(ArrayPlace(len(arrays)))
            arrays.append(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
        elif isinstance(leaf, (bool, int, float, complex, str, bytes)):
            kept.append(leaf)
        else:
            held, rebuild = hoist(leaf, f"{name}: {what}")
            kept.append(CallablePlace(len(arrays), len(arrays) + len(held), rebuild) if held else leaf)
            arrays += held
    return Template(tree, tuple(kept))
