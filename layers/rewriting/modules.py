"""nnx modules among the arguments: split into a graph and arrays outside, merged inside, and what changed is written back.

So a module that counts random numbers or keeps batch statistics does so under `rewrite` as under `flax.nnx.jit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx


@dataclass(frozen=True)
class Place:
    """Where the module of that number was."""

    number: int


def is_module(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def take_out(values: Any) -> tuple[Any, list[Any]]:
    """The pytree with places for its outermost modules, and these; a module that occurs twice has one place."""
    modules: list[Any] = []

    def place(x: Any) -> Any:
        if not is_module(x):
            return x
        at = next((i for i, m in enumerate(modules) if m is x), None)
        if at is None:
            at = len(modules)
            modules.append(x)
        return Place(at)

    return jax.tree.map(place, values, is_leaf=is_module), modules


def put_back(values: Any, modules: Sequence[Any]) -> Any:
    """The pytree with modules in their places."""
    return jax.tree.map(lambda x: modules[x.number] if isinstance(x, Place) else x, values)


@dataclass(frozen=True)
class Held:
    """What a variable of the modules holds, at a time."""

    path: tuple[Any, ...]
    leaves: list[Any]
    structure: Any


def variables_of(modules: Sequence[Any]) -> list[Held]:
    """What each variable that the modules hold holds now, in a fixed order."""
    return [Held(path, *jax.tree.flatten(variable)) for path, variable in nnx.to_flat_state(nnx.split(tuple(modules))[1])]


def changes(modules: Sequence[Any], before: Sequence[Held]) -> dict[int, list[Any]]:
    """What the variables that a call has changed hold after it, by their number in `before`.

    Raises:
        ValueError: where a module holds a variable that it did not hold before.
    """
    number = {held.path: i for i, held in enumerate(before)}
    changed = {}
    for now in variables_of(modules):
        if now.path not in number:
            name = ".".join(map(str, now.path[1:]))
            raise ValueError(f"rewrite: the call made a new variable, {name}, in a module: make it before, or return its value")
        was = before[number[now.path]]
        if len(was.leaves) != len(now.leaves) or any(a is not b for a, b in zip(now.leaves, was.leaves, strict=True)):
            changed[number[now.path]] = now.leaves
    return changed


def write_back(modules: Sequence[Any], before: Sequence[Held], changed: dict[int, list[Any]]) -> None:
    """Gives the variables of the modules their new values."""
    if changed:
        new = [(before[i].path, jax.tree.unflatten(before[i].structure, leaves)) for i, leaves in changed.items()]
        nnx.update(tuple(modules), nnx.from_flat_state(new))
