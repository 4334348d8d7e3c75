"""Which axes of one array those of another are, where the second is computed from the first."""

from __future__ import annotations

from layers.rewriting.axes import Atom, Axis, flat, leaves, new_axes, spread_axes, through
from layers.rewriting.graph import Value, widens
from layers.rewriting.primitives import LAYOUT, UNARY

REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
BESIDE = frozenset({"add", "sub", "mul", "div", "max", "min", "select_n"})


class Follow:
    """Follows the axes of `base` through layouts, elementwise operations and reductions.

    A value that is combined with another one has to lie beside it: the same atoms on the same axes, but where one is repeated.
    """

    def __init__(self, base: Value):
        self.base = base
        self.own = new_axes(base.shape)
        self._found: dict[int, list[Axis] | None] = {id(base): self.own}

    def axes(self, v: Value, depth: int = 0) -> list[Axis] | None:
        """The axes of `v` in atoms of the base and new ones; None where it is not computed from the base, or does not lie beside it."""
        if id(v) not in self._found:
            self._found[id(v)] = None if depth > 60 else self._axes(v, depth)
        return self._found[id(v)]

    def _axes(self, v: Value, depth: int) -> list[Axis] | None:
        n = v.node
        if n is None or not n.inputs:
            return None
        if n.name in LAYOUT | UNARY or widens(n):
            below = self.axes(n.inputs[0], depth + 1)
            return None if below is None else through(n, below)
        if n.name in REDUCTIONS:
            below = self.axes(n.inputs[0], depth + 1)
            return None if below is None else [a for i, a in enumerate(below) if i not in n.params["axes"]]
        if n.name in BESIDE:
            found = [(x, self.axes(x, depth + 1)) for x in n.inputs]
            spread = [spread_axes(x, v, a) if len(a) != v.ndim else a for x, a in found if a is not None]
            return self._merge([s for s in spread if s is not None], v.ndim) if spread else None
        return None

    def _merge(self, several: list[list[Axis]], ndim: int) -> list[Axis] | None:
        if any(len(axes) != ndim for axes in several):
            return None
        out: list[Axis] = []
        for same in zip(*several, strict=True):
            told = [leaves(a) for a in same if self.of_base(leaves(a))]
            if any(t != told[0] for t in told):
                return None
            out.append(told[0] if told else same[0])
        return out

    def of_base(self, atoms: list[Atom]) -> bool:
        return any(x in flat(self.own) for x in atoms)

    def rows(self, without: int) -> list[Atom]:
        """The atoms of the base but for one axis."""
        return flat([a for i, a in enumerate(self.own) if i != without])

    def is_row_of(self, v: Value, without: int) -> bool:
        """Whether `v` holds one number for each row of the base, in order."""
        axes = self.axes(v)
        return (
            axes is not None
            and [x for x in flat(axes) if self.of_base([x])] == self.rows(without)
            and v.size == self.base.size // max(self.base.shape[without], 1)
        )
