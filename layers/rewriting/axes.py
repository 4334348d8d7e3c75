"""Axes as lists of atoms, so that one matcher sees every layout.

An axis is a list of atoms, in order, outermost first. A transposition permutes axes, a reshape merges and splits them, a product of matrices
makes those of its operands one. An atom that has to be divided knows its parts, so that all who hold it see them. An axis of length 1 has no atoms.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.primitives import VARYING

Axis = list["Atom"]


class Atom:
    """A part of an axis, until it is divided."""

    __slots__ = ("parts", "size")

    def __init__(self, size: int):
        self.size = size
        self.parts: list[Atom] | None = None

    def leaves(self) -> list[Atom]:
        return [self] if self.parts is None else [x for p in self.parts for x in p.leaves()]


def leaves(axis: Axis) -> list[Atom]:
    """The atoms of an axis as they are divided now."""
    return [x for a in axis for x in a.leaves()]


def flat(axes: Sequence[Axis]) -> list[Atom]:
    """The atoms of several axes, in order."""
    return [x for axis in axes for x in leaves(axis)]


def length(atoms: Sequence[Atom]) -> int:
    return math.prod(a.size for a in atoms)


def equal(one: Sequence[Axis], two: Sequence[Axis]) -> bool:
    return len(one) == len(two) and all(leaves(a) == leaves(b) for a, b in zip(one, two, strict=True))


def new_axes(shape: Sequence[int]) -> list[Axis]:
    return [[Atom(n)] if n != 1 else [] for n in shape]


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis] | None:
    """The axes after a reshape, or None where they cannot be told."""
    queue, out = collections.deque(flat(axes)), []
    for n in shape:
        group: Axis = []
        while n != 1:
            if not queue:
                return None
            a = queue.popleft()
            if n % a.size == 0:
                group.append(a)
                n //= a.size
            elif a.size % n == 0:
                a.parts = [Atom(n), Atom(a.size // n)]
                group.append(a.parts[0])
                queue.appendleft(a.parts[1])
                n = 1
            else:
                return None
        out.append(group)
    return out if not queue else None


def unify(one: Axis, two: Axis) -> bool:
    """Makes two axes of one length the same, dividing the atoms of both as needed; False where they do not divide."""
    left, right = collections.deque(leaves(one)), collections.deque(leaves(two))
    while left and right:
        a, b = left.popleft(), right.popleft()
        if a is b:
            continue
        if a.size == b.size:
            a.parts = [b]
            continue
        if a.size < b.size:
            a, b, left, right = b, a, right, left
        if a.size % b.size:
            return False
        rest = Atom(a.size // b.size)
        a.parts = [b, rest]
        left.appendleft(rest)
    return not left and not right


def through(n: Node, axes: list[Axis]) -> list[Axis] | None:
    """The axes of the output of a layout or elementwise node, given those of the input that is followed; None where they are lost."""
    if n.name == "transpose":
        return [axes[i] for i in n.params["permutation"]]
    if n.name in ("reshape", "squeeze", "expand_dims"):
        return regroup(axes, n.out.shape) if n.name != "reshape" or n.params.get("dimensions") is None else None
    if n.name == "broadcast_in_dim":
        out = new_axes(n.out.shape)
        for i, j in enumerate(n.params["broadcast_dimensions"]):
            if n.inputs[0].shape[i] == n.out.shape[j]:
                out[j] = axes[i]
        return out
    return axes


def back_through(n: Node, axes: list[Axis]) -> list[Axis] | None:
    """The axes of the input of a layout node or cast, given those of the output; None where they are not known."""
    x = n.inputs[0]
    if n.name == "broadcast_in_dim":
        return [axes[j] if x.shape[i] == n.out.shape[j] else [] for i, j in enumerate(n.params["broadcast_dimensions"])]
    if n.name == "transpose":
        out: list[Axis] = [[] for _ in range(x.ndim)]
        for i, j in enumerate(n.params["permutation"]):
            out[j] = axes[i]
        return out
    if n.name in ("reshape", "squeeze", "expand_dims"):
        held = all(length(leaves(a)) == m for a, m in zip(axes, n.out.shape, strict=True))
        return regroup(axes, x.shape) if held and (n.name != "reshape" or n.params.get("dimensions") is None) else None
    return axes if widens(n) or n.name in VARYING or n.name in ("stop_gradient", "convert_element_type") else None


def forward(chain: Sequence[Node], axes: list[Axis] | None) -> list[Axis] | None:
    """The axes after the nodes of `chain`, last first; or None."""
    for n in reversed(chain):
        axes = through(n, axes) if axes is not None else None
    return axes


def dot_axes(n: Node, left: list[Axis], right: list[Axis]) -> list[Axis] | None:
    """The axes of a product of matrices; those that are contracted or batched together become the same. None where they do not fit."""
    (lc, rc), (lb, rb) = n.params["dimension_numbers"]
    if not all(unify(left[i], right[j]) for i, j in zip((*lc, *lb), (*rc, *rb), strict=True)):
        return None
    mine = [a for i, a in enumerate(left) if i not in (*lc, *lb)]
    return [left[i] for i in lb] + mine + [a for j, a in enumerate(right) if j not in (*rc, *rb)]


def spread_axes(v: Value, like: Value, axes: list[Axis]) -> list[Axis] | None:
    """The axes of an operand that is broadcast against `like`, whose axes are given."""
    if v.ndim != like.ndim:
        return [] if v.ndim == 0 else None
    return [a if v.shape[i] == like.shape[i] else [] for i, a in enumerate(axes)]


class NoPlace(ValueError):
    """An axis of an array belongs to none of the groups."""


def arrange(x: Any, axes: Sequence[Axis], groups: Sequence[Sequence[Atom]], xp: Any = jnp) -> Any:
    """`x` with the atoms of its axes in the order of `groups`, each group one axis.

    A group of which x has a part is filled by repeating x along the rest; one of which it has nothing has length 1.
    """
    mine = flat(axes)
    x = xp.reshape(x, [a.size for a in mine])
    order: list[int | None] = []
    sizes: list[int] = []
    for g in groups:
        for a in g if any(a in mine for a in g) else ():
            order.append(mine.index(a) if a in mine else None)
            sizes.append(a.size)
    there = [i for i in order if i is not None]
    if sorted(there) != list(range(len(mine))):
        raise NoPlace("an axis belongs to no group")
    x = xp.transpose(x, there)
    if None in order:
        x = xp.broadcast_to(xp.expand_dims(x, tuple(k for k, i in enumerate(order) if i is None)), sizes)
    return x.reshape([length(g) if any(a in mine for a in g) else 1 for g in groups])


def restore(y: Any, groups: Sequence[Sequence[Atom]], axes: Sequence[Axis], shape: Sequence[int]) -> Any:
    """An array whose axes are `groups`, with its atoms in the order of `axes`, and of that shape."""
    held = [a for g in groups for a in g]
    y = y.reshape([a.size for a in held])
    return jnp.transpose(y, [held.index(a) for a in flat(axes)]).reshape(shape)
