"""Pytrees with their arrays apart: what JAX traces on one side, any other Python object on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.closures import hoist
from layers.core.context import is_array
from layers.core.cotangents import NOT_AN_ARRAY


@dataclass(frozen=True)
class Template:
    """A pytree whose arrays are kept elsewhere: `leaves` holds the place of each array and every other leaf as it is."""

    tree: Any
    leaves: tuple[Any, ...]

    def fill(self, arrays: Sequence[Any]) -> Any:
        return self.tree.unflatten([x.fill(arrays) if isinstance(x, _Place) else x for x in self.leaves])

    def marks(self) -> Any:
        """The structure with places for arrays and `NOT_AN_ARRAY` for the rest."""
        return self.tree.unflatten([x.start if isinstance(x, ArrayPlace) else NOT_AN_ARRAY for x in self.leaves])


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


def take_apart(name: str, what: str, value: Any, arrays: list[Any]) -> Template:
    """Moves the arrays of a pytree to the end of `arrays`; what remains is static."""
    leaves, tree = jax.tree.flatten(value)
    kept: list[Any] = []
    for leaf in leaves:
        if is_array(leaf):
            kept.append(ArrayPlace(len(arrays)))
            arrays.append(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
        elif isinstance(leaf, (bool, int, float, complex, str, bytes)):
            kept.append(leaf)
        else:
            held, rebuild = hoist(leaf, f"{name}: {what}")
            kept.append(CallablePlace(len(arrays), len(arrays) + len(held), rebuild) if held else leaf)
            arrays += held
    return Template(tree, tuple(kept))
