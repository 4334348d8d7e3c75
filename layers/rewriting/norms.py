"""RMS and layer norms over any axes: x / √(mean x² + ε), or that of x - mean x, times scales, plus a bias, with casts anywhere.

The middle is the reciprocal root. From there back to the mean of squares, and forward as long as there is a product of x, of the root, of arrays of
features and of numbers, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from layers.norms.layer_norm import LayerNormFunction
from layers.norms.rms_norm import RMSNormFunction
from layers.rewriting.axes import Atom, Axis, arrange, back_through, equal, flat, length, restore, spread_axes
from layers.rewriting.constants import number_of
from layers.rewriting.follow import Follow
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.match import Match, Nearly, interior, need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.walk import before_casts, compact, with_number


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


def find_norm(n: Node) -> Match | None:
    """The norm whose reciprocal root is `n`."""
    s = _find_statistic(n)
    if s is None:
        return None
    need(length(s.features) > 1, "the mean is of one number")
    top, factors, inner = _product_above(s)
    bias = None
    if s.centred and (u := top.only_user) is not None and u.name == "add":
        bias, top, inner = _bias(s, u, top, inner)
    nodes = s.nodes | inner | ({s.x.node} if _is_widened(s.x) and s.x.node is not None else set())
    nodes = interior({m for m in nodes if m.place <= _place(top)}, [top])
    return _match(s, top, nodes, factors, bias)


def _place(v: Value) -> int:
    return -1 if v.node is None else v.node.place


def _is_widened(x: Value) -> bool:
    """Whether an array was cast from a narrower dtype, which the rule then reads."""
    return x.node is not None and widens(x.node) and x.node.inputs[0].dtype.itemsize < x.dtype.itemsize


def _find_statistic(n: Node) -> Statistic | None:
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
    mean = _mean(v, set())
    inside = before_casts(mean[0], set()).node if mean is not None else None
    added = with_number(inside) if inside is not None and inside.name == "add" else None
    return added is not None and _squared(before_casts(added[1], set()), set()) is not None


def _unlaid(v: Value, nodes: set[Node]) -> Value:
    while v.node is not None and (v.node.name in LAYOUT or widens(v.node)):
        nodes.add(v.node)
        v = v.node.inputs[0]
    return v


def _mean(v: Value, nodes: set[Node]) -> tuple[Value, tuple[int, ...]] | None:
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
    mean = _mean(v, nodes)
    d = _squared(before_casts(mean[0], nodes), nodes) if mean is not None else None
    if mean is None or d is None:
        return None
    over = mean[1]
    if d.node is not None and d.node.name == "sub" and _mean(d.node.inputs[1], inner := set()) == (d.node.inputs[0], over):
        x = d.node.inputs[0]
        if _lies_beside(x, d.node, over):
            nodes |= inner | {d.node}
            return x, d, over
    return d, d, over


def _lies_beside(x: Value, sub: Node, over: tuple[int, ...]) -> bool:
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
    first = _mean(v.node.inputs[0], inner)
    x = _squared(first[0], inner) if first is not None else None
    mean = _squared(_unlaid(v.node.inputs[1], inner), inner) if x is not None else None
    if first is None or x is None or mean is None or _mean(mean, inner) != (x, first[1]) or Follow(x).axes(v) is None:
        return None
    less = [u for u in dict.fromkeys(x.users) if u.name == "sub" and u.inputs[0] is x and _mean(u.inputs[1], set()) == (x, first[1])]
    if len(less) != 1 or not _lies_beside(x, less[0], first[1]):
        return None
    _mean(less[0].inputs[1], inner)
    nodes |= inner | {less[0]}
    return x, less[0].out, first[1]


@dataclass
class Factors:
    """d · root · vectors · number: each vector with its axes and the power that it is taken to."""

    d: int = 0
    root: int = 0
    number: float = 1.0
    vectors: Sequence[tuple[Value, list[Axis], int]] = ()

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.d + other.d, self.root + other.root, self.number * other.number, (*self.vectors, *other.vectors))

    def whole(self, power: int) -> bool:
        return self.d == 1 and self.root == power


def _product_above(s: Statistic) -> tuple[Value, Factors, set[Node]]:
    """The furthest value above the root that is a product of x, the root, vectors and numbers."""
    best = None
    c = s.root
    while (u := c.only_user) is not None and (u.name in ("mul", "div") or widens(u) or (u.name in LAYOUT and c.size < s.x.size)):
        c = u.out
        if c.shape == s.x.shape:
            inner: set[Node] = set()
            found = _factors(c, s.follow.own, s, inner, 1)
            if found is None:
                break
            if found.whole(s.power):
                best = c, found, inner
    if best is None:
        raise Nearly("the reciprocal root is not multiplied with what it was computed from")
    return best


def _factors(v: Value, axes: list[Axis], s: Statistic, nodes: set[Node], power: int) -> Factors | None:
    narrow = s.x.node.inputs[0] if _is_widened(s.x) and s.x.node is not None and not s.centred else None
    if v is s.difference or v is narrow or _is_difference(v, s, nodes):
        return Factors(d=power) if equal(axes, s.follow.own) else None
    if v is s.root:
        own = s.follow.axes(v)
        return Factors(root=power) if own is not None and _same_rows(s, own, axes) else None
    if (number := number_of(v)) is not None and number:
        return Factors(number=float(number) ** power)
    n = v.node
    if n is not None and (n.name in LAYOUT or widens(n)) and (v.size < s.x.size or n.inputs[0].size < v.size or widens(n)):
        back = back_through(n, axes)
        if back is None:
            return None
        found = _factors(n.inputs[0], back, s, nodes, power)
        if found is not None:
            nodes.add(n)
        return found
    if n is not None and n.name in ("mul", "div") and (v.size >= s.x.size or _depends(v, s)):
        spread = [spread_axes(x, v, axes) for x in n.inputs]
        a = _factors(n.inputs[0], spread[0], s, nodes, power) if spread[0] is not None else None
        b = _factors(n.inputs[1], spread[1], s, nodes, power if n.name == "mul" else -power) if a is not None and spread[1] is not None else None
        if a is None or b is None:
            return None
        nodes.add(n)
        return a + b
    base, own = compact(v, axes, set())
    inside = set(flat(own)) <= set(s.features) and not _depends(v, s)
    return Factors(vectors=((base, own, power),)) if inside else None


def _is_difference(v: Value, s: Statistic, nodes: set[Node]) -> bool:
    """Whether `v` is x - mean x, computed once more."""
    n, inner = v.node, set()
    again = s.centred and n is not None and n.name == "sub" and n.inputs[0] is s.x and _mean(n.inputs[1], inner) == (s.x, s.over)
    if not again or n is None or not _lies_beside(s.x, n, s.over):
        return False
    nodes |= inner | {n}
    return True


def _same_rows(s: Statistic, own: list[Axis], axes: list[Axis]) -> bool:
    """Whether the root lies at `axes`: what it has of the rows is the same, and what it does not have are the features."""
    if len(own) != len(axes):
        return False
    for mine, there in zip(own, axes, strict=True):
        told = [x for x in flat([mine]) if s.follow.of_base([x])]
        if told and told != flat([there]):
            return False
    return [x for x in flat(axes) if x not in s.features] == s.rows


def _depends(v: Value, s: Statistic) -> bool:
    return s.follow.axes(v) is not None


def _bias(s: Statistic, u: Node, top: Value, inner: set[Node]) -> tuple[tuple[Value, list[Axis]] | None, Value, set[Node]]:
    """The array of features that is added to a layer norm, and what then is its end."""
    other = u.other(top)
    spread = spread_axes(other, u.out, s.follow.own)
    if other is top or spread is None or number_of(other) is not None:
        return None, top, inner
    base, axes = compact(other, spread, set())
    if not set(flat(axes)) <= set(s.features) or u.out.shape != top.shape:
        return None, top, inner
    return (base, axes), u.out, inner | {u}


def _scale(vectors: Sequence[Any], factors: Factors, size: int, dtype: Any) -> Any:
    """The product of the vectors and the number, one for each feature; None for 1."""
    scale = None if factors.number == 1 else jnp.asarray(factors.number, dtype)
    for v, (_, _, power) in zip(vectors, factors.vectors, strict=True):
        v = v if power == 1 else 1 / v
        scale = v if scale is None else scale * v
    return None if scale is None else jnp.broadcast_to(scale, (size,))


def _match(s: Statistic, top: Value, nodes: set[Node], factors: Factors, bias: tuple[Value, list[Axis]] | None) -> Match:
    x = s.x.node.inputs[0] if _is_widened(s.x) and s.x.node is not None else s.x
    dtype = None if top.dtype == x.dtype else top.dtype
    in_order = s.rows + s.features == flat(s.follow.own)
    groups = [s.rows, s.features]

    def run(x: Any, *rest: Any) -> list[Any]:
        vectors = [arrange(v, axes, [s.features]) for v, (_, axes, _) in zip(rest, factors.vectors, strict=False)]
        scale = _scale(vectors, factors, length(s.features), top.dtype)
        if not in_order or len(s.over) != 1:
            x = arrange(x, s.follow.own, groups)
        if not s.centred:
            y = RMSNormFunction.apply(x, scale, s.epsilon, dtype=dtype)
        else:
            shift = None if bias is None else jnp.broadcast_to(arrange(rest[-1], bias[1], [s.features]), (length(s.features),))
            y = LayerNormFunction.apply(x, scale, shift, s.epsilon, dtype=dtype)
        return [y.reshape(top.shape) if in_order else restore(y, groups, s.follow.own, top.shape)]

    inputs = [x, *(v for v, _, _ in factors.vectors), *([bias[0]] if bias is not None else [])]
    keeps = length(s.rows) * (8 if s.centred else 4)
    name = "layer_norm" if s.centred else "rms_norm"
    return Match(
        name, nodes, inputs, [top], run, keeps=keeps, detail=f"epsilon {s.epsilon:.3g}" + (f", over {len(s.over)} axes" if len(s.over) > 1 else "")
    )
