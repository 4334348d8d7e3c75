"""The middle of a norm: the reciprocal root of a mean of squares, of x or of x - mean x, in the ways that people write it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layers.rewriting.axes import Atom, flat, spread_axes
from layers.rewriting.follow import Follow
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.match import need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.walk import before_casts, with_number


@dataclass
class Statistic:
    """1 / √(mean of d² + ε), d = x or x - mean x."""

    x: Value
    difference: Value
    root: Value
    power: int
    epsilon: float
    over: tuple[int, ...]
    follow: Follow
    nodes: set[Node]

    @property
    def centred(self) -> bool:
        return self.difference is not self.x

    @property
    def rows(self) -> list[Atom]:
        return flat([a for i, a in enumerate(self.follow.own) if i not in self.over])

    @property
    def features(self) -> list[Atom]:
        return flat([self.follow.own[i] for i in self.over])


def is_widened(x: Value) -> bool:
    """Whether an array was cast from a narrower dtype, which the rule then reads."""
    return x.node is not None and widens(x.node) and x.node.inputs[0].dtype.itemsize < x.dtype.itemsize


def find_statistic(n: Node) -> Statistic | None:
    if n.name not in ("rsqrt", "sqrt"):
        return None
    nodes = {n}
    a = before_casts(n.inputs[0], nodes)
    found = with_number(a.node) if a.node is not None and a.node.name == "add" else None
    need(found is not None or not _has_epsilon_inside(a), "epsilon is added inside the mean, to each number")
    if found is None or a.node is None:
        return None
    epsilon, square = found
    nodes.add(a.node)
    base = _unlaid(square, nodes)
    if base.node is not None and base.node.name == "max" and (floor := with_number(base.node)) is not None and floor[0] == 0:
        nodes.add(base.node)
        base = _unlaid(floor[1], nodes)
    middle = _difference_of_moments(base, nodes) if base.node is not None and base.node.name == "sub" else _mean_of_squares(base, nodes)
    if middle is None:
        return None
    x, difference, over = middle
    follow = Follow(x)
    s = Statistic(x, difference, n.out, 1 if n.name == "rsqrt" else -1, epsilon, over, follow, nodes)
    axes = follow.axes(n.out)
    need(axes is not None and [q for q in flat(axes) if follow.of_base([q])] == s.rows, "the statistic does not lie beside the rows that it is of")
    need(epsilon >= 0, "epsilon is negative")
    return s


def _has_epsilon_inside(v: Value) -> bool:
    """Whether `v` is the mean of squares that each had a number added."""
    mean = mean_of(v, set())
    inside = before_casts(mean[0], set()).node if mean is not None else None
    added = with_number(inside) if inside is not None and inside.name == "add" else None
    return added is not None and _squared(before_casts(added[1], set()), set()) is not None


def _unlaid(v: Value, nodes: set[Node]) -> Value:
    while v.node is not None and (v.node.name in LAYOUT or widens(v.node)):
        nodes.add(v.node)
        v = v.node.inputs[0]
    return v


def mean_of(v: Value, nodes: set[Node]) -> tuple[Value, tuple[int, ...]] | None:
    """(array, axes) of whose mean `v` is, laid out along it or not."""
    inner: set[Node] = set()
    v = _unlaid(v, inner)
    if v.node is None or v.node.name not in ("div", "mul") or (found := with_number(v.node)) is None:
        return None
    number, total = found
    if v.node.name == "div" and total is not v.node.inputs[0]:
        return None
    inner.add(v.node)
    total = _unlaid(total, inner)
    if total.node is None or total.node.name != "reduce_sum":
        return None
    x, over = total.node.inputs[0], tuple(int(i) for i in total.node.params["axes"])
    size = math.prod(x.shape[i] for i in over)
    if not math.isclose(number if v.node.name == "div" else 1 / number if number else 0, size, rel_tol=1e-3 if v.dtype.itemsize < 4 else 1e-6):
        return None
    nodes |= inner | {total.node}
    return x, over


def _squared(v: Value, nodes: set[Node]) -> Value | None:
    n = v.node
    square = n is not None and (
        n.name == "square" or (n.name == "integer_pow" and n.params["y"] == 2) or (n.name == "mul" and n.inputs[0] is n.inputs[1])
    )
    if not square or n is None:
        return None
    nodes.add(n)
    return n.inputs[0]


def _mean_of_squares(v: Value, nodes: set[Node]) -> tuple[Value, Value, tuple[int, ...]] | None:
    """(x, d, axes) where `v` is the mean of d², d = x or x - mean x."""
    mean = mean_of(v, nodes)
    d = _squared(before_casts(mean[0], nodes), nodes) if mean is not None else None
    if mean is None or d is None:
        return None
    over = mean[1]
    if d.node is not None and d.node.name == "sub" and mean_of(d.node.inputs[1], inner := set()) == (d.node.inputs[0], over):
        x = d.node.inputs[0]
        if lies_beside(x, d.node, over):
            nodes |= inner | {d.node}
            return x, d, over
    return d, d, over


def lies_beside(x: Value, sub: Node, over: tuple[int, ...]) -> bool:
    """Whether the mean that is subtracted from `x` lies along the rows of it, but for the axes it is over."""
    follow = Follow(x)
    axes = follow.axes(sub.inputs[1])
    spread = spread_axes(sub.inputs[1], sub.out, axes) if axes is not None and len(axes) != x.ndim else axes
    return (
        spread is not None
        and len(spread) == x.ndim
        and all((not follow.of_base(flat([a]))) if i in over else flat([a]) == flat([follow.own[i]]) for i, a in enumerate(spread))
    )


def _difference_of_moments(v: Value, nodes: set[Node]) -> tuple[Value, Value, tuple[int, ...]] | None:
    """The same, where `v` is mean x² - (mean x)²."""
    assert v.node is not None
    inner = {v.node}
    first = mean_of(v.node.inputs[0], inner)
    x = _squared(first[0], inner) if first is not None else None
    mean = _squared(_unlaid(v.node.inputs[1], inner), inner) if x is not None else None
    if first is None or x is None or mean is None or mean_of(mean, inner) != (x, first[1]) or Follow(x).axes(v) is None:
        return None
    less = [u for u in dict.fromkeys(x.users) if u.name == "sub" and u.inputs[0] is x and mean_of(u.inputs[1], set()) == (x, first[1])]
    if len(less) != 1 or not lies_beside(x, less[0], first[1]):
        return None
    mean_of(less[0].inputs[1], inner)
    nodes |= inner | {less[0]}
    return x, less[0].out, first[1]
