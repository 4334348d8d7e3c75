"""RMS and layer norms over any axes: x / √(mean x² + ε), or that of x - mean x, times scales, plus a bias, with casts anywhere.

The middle is the reciprocal root. From there back to the mean of squares, and forward as long as there is a product of x, of the root, of arrays of
features and of numbers, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from layers.norms.layer_norm import LayerNormFunction
from layers.norms.rms_norm import RMSNormFunction
from layers.rewriting.axes import Axis, arrange, back_through, equal, flat, length, restore, spread_axes
from layers.rewriting.constants import number_of
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.match import Match, Nearly, interior, need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.statistic import Statistic, find_statistic, is_widened, lies_beside, mean_of
from layers.rewriting.walk import compact


def find_norm(n: Node) -> Match | None:
    """The norm whose reciprocal root is `n`."""
    s = find_statistic(n)
    if s is None:
        return None
    need(length(s.features) > 1, "the mean is of one number")
    top, factors, inner = _product_above(s)
    bias = None
    if s.centred and (u := top.only_user) is not None and u.name == "add":
        bias, top, inner = _bias(s, u, top, inner)
    nodes = s.nodes | inner | ({s.x.node} if is_widened(s.x) and s.x.node is not None else set())
    nodes = interior({m for m in nodes if m.place <= _place(top)}, [top])
    return _match(s, top, nodes, factors, bias)


def _place(v: Value) -> int:
    return -1 if v.node is None else v.node.place


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
    narrow = s.x.node.inputs[0] if is_widened(s.x) and s.x.node is not None and not s.centred else None
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
    again = s.centred and n is not None and n.name == "sub" and n.inputs[0] is s.x and mean_of(n.inputs[1], inner) == (s.x, s.over)
    if not again or n is None or not lies_beside(s.x, n, s.over):
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
    x = s.x.node.inputs[0] if is_widened(s.x) and s.x.node is not None else s.x
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
