"""Structures of pytrees, compared and walked without making any: a class may convert or check what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from layers.core import compat


@dataclass(frozen=True)
class Skeleton:
    """A pytree with a mark in place of each leaf.

    Attributes:
        tree: the structure.
        marks: one for each leaf, in order.
    """

    tree: Any
    marks: tuple[Any, ...]

    def __str__(self) -> str:
        return str(self.tree)

    @property
    def kind(self) -> type | None:
        """The class of the node; None for a leaf."""
        data = self.tree.node_data()
        return None if data is None else data[0]

    @property
    def is_leaf(self) -> bool:
        return self.kind is None

    def children(self) -> list[Skeleton]:
        """The parts of a node, in order."""
        parts, start = [], 0
        for tree in self.tree.children():
            parts.append(Skeleton(tree, self.marks[start : start + tree.num_leaves]))
            start += tree.num_leaves
        return parts

    def keys(self) -> Sequence[Any]:
        """What the parts of a node are called: the keys of a dict, otherwise numbers."""
        kind, data = self.tree.node_data()
        return list(data) if kind is dict else range(len(self.tree.children()))

    def parts_beside(self, given: Any) -> list[tuple[Skeleton, Any]] | None:
        """Each part of the node with that of `given`, a pytree; None where `given` has other parts."""
        theirs = compat.children(given)
        ours = self.children()
        if self.is_leaf or theirs is None or len(ours) != len(theirs[0]) or (self.kind is dict and list(theirs[1] or ()) != list(self.keys())):
            return None
        return list(zip(ours, theirs[0], strict=True))

    def leaves_beside(self, given: Any) -> list[Any] | None:
        """What `given` has at each leaf, where None stands for any part; None where it has another structure."""
        if given is None:
            return [None] * len(self.marks)
        if self.is_leaf:
            return [given] if compat.children(given) is None else None
        parts = self.parts_beside(given)
        found = [part.leaves_beside(g) for part, g in parts] if parts is not None else [None]
        known = [leaves for leaves in found if leaves is not None]
        return [x for leaves in known for x in leaves] if len(known) == len(found) else None

    def is_made_like(self, given: Any) -> bool:
        """Whether `given` is of the same classes, with None for any part."""
        if given is None or self.is_leaf:
            return given is None or compat.children(given) is None
        parts = self.parts_beside(given)
        return type(given) is self.kind and parts is not None and all(part.is_made_like(g) for part, g in parts)


def skeleton(value: Any) -> Skeleton:
    """The skeleton of a pytree, each leaf marked by its number."""
    tree = jax.tree.structure(value)
    return Skeleton(tree, tuple(range(tree.num_leaves)))


def make_with_gaps(tree: Any, leaves: Sequence[Any], stand_ins: Sequence[Any]) -> Any:
    """A pytree of these leaves, some of them None; where a class refuses None, of the stand-ins for them."""
    try:
        return tree.unflatten(leaves)
    except Exception:  # what a class raises that does not take None
        return tree.unflatten([s if x is None else x for x, s in zip(leaves, stand_ins, strict=True)])
