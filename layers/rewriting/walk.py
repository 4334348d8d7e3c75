"""Steps along the flow of data that several patterns take."""

from __future__ import annotations

from layers.rewriting.axes import Axis, back_through, forward, leaves, new_axes
from layers.rewriting.constants import number_of
from layers.rewriting.graph import Node, Value, is_float, widens
from layers.rewriting.primitives import LAYOUT


def before_casts(v: Value, nodes: set[Node]) -> Value:
    """The value before casts between floating-point dtypes, which are added to `nodes`."""
    while v.node is not None and widens(v.node):
        nodes.add(v.node)
        v = v.node.inputs[0]
    return v


def before_layout(v: Value) -> tuple[Value, list[Node]]:
    """The value before casts and what lays it out anew or repeats it, and the nodes of these, last first."""
    chain = []
    while v.node is not None and (v.node.name in LAYOUT or widens(v.node) or v.node.name == "stop_gradient"):
        chain.append(v.node)
        v = v.node.inputs[0]
    return v, chain


def unlaid(v: Value) -> tuple[Value, list[Node]]:
    """The same, as long as nothing is repeated."""
    chain = []
    while v.node is not None and ((v.node.name in LAYOUT and v.node.inputs[0].size == v.size) or widens(v.node) or v.node.name == "stop_gradient"):
        chain.append(v.node)
        v = v.node.inputs[0]
    return v, chain


def compact(v: Value, axes: list[Axis], nodes: set[Node]) -> tuple[Value, list[Axis]]:
    """A value before it was cast, laid out and repeated, with its axes, given those that it has now."""
    while v.node is not None and (v.node.name in LAYOUT or widens(v.node)):
        back = back_through(v.node, axes)
        if back is None:
            break
        nodes.add(v.node)
        v, axes = v.node.inputs[0], back
    return v, axes


def unrepeated(v: Value, see: bool) -> tuple[Value, list[Axis], list[Axis]]:
    """(value, its axes, axes of `v`): the value from which `v` is repeated along new axes, if it is and `see`."""
    base, chain = before_layout(v)
    while chain and chain[-1].name not in LAYOUT:
        base = chain.pop().out
    if see and any(n.inputs[0].size < n.out.size for n in chain) and not any(widens(n) for n in chain):
        start = new_axes(base.shape)
        axes = forward(chain, start)
        if axes is not None:
            return base, start, axes
    axes = new_axes(v.shape)
    return v, axes, axes


def with_number(n: Node) -> tuple[float, Value] | None:
    """(number, other operand) of a node of two operands of which one is the same number everywhere; or None."""
    for i in (1, 0):
        if (number := number_of(n.inputs[i])) is not None:
            return number, n.inputs[1 - i]
    return None


def row_statistic(v: Value, of: Value, name: str, nodes: set[Node]) -> tuple[int, ...] | None:
    """The axes of `of` over which the reduction `name` was taken whose result `v` is, with each number beside its row; or None.

    The reduction may be of `of` in another layout, as under `vmap`.
    """
    chain: list[Node] = []
    guards: set[Node] = set()
    x = v
    while x.node is not None and x.node.name != name:
        n = x.node
        if n.name in LAYOUT or widens(n) or n.name == "stop_gradient":
            chain.append(n)
            x = n.inputs[0]
        elif n.name == "select_n" and n.inputs[0].node is not None and n.inputs[0].node.name == "is_finite" and number_of(n.inputs[1]) == 0:
            guards |= {n, n.inputs[0].node}  # the maximum of a row of infinities, as 0
            x = n.inputs[2]
        else:
            return None
    if x.node is None:
        return None
    (one, first), (two, second) = unlaid(x.node.inputs[0]), unlaid(of)
    if one is not two:
        return None
    start = new_axes(one.shape)
    reduced, mine = forward(first, start), forward(second, start)
    if reduced is None or mine is None:
        return None
    over = x.node.params["axes"]
    rows = forward(chain, [a for i, a in enumerate(reduced) if i not in over])
    if rows is None or len(rows) != len(mine):
        return None
    gone = {y for i in over for y in leaves(reduced[i])}
    every = {y for a in start for y in leaves(a)}
    axes = tuple(i for i, a in enumerate(mine) if set(leaves(a)) & gone)
    if {y for i in axes for y in leaves(mine[i])} != gone or not gone:
        return None
    if any(set(leaves(rows[i])) & every for i in axes):
        return None
    if any(leaves(r) != leaves(m) for i, (r, m) in enumerate(zip(rows, mine, strict=True)) if i not in axes):
        return None
    nodes |= {*chain, *guards, x.node, *(set(first) - set(second))}
    return axes


def is_product(n: Node) -> bool:
    """Whether a node is a product of matrices of floating-point numbers in the precision that this library's have."""
    precision = n.params.get("precision")
    usual = precision is None or str(precision) in (
        "BF16_BF16_F32",
        "F16_F16_F32",
        "DotAlgorithmPreset.BF16_BF16_F32",
        "DotAlgorithmPreset.F16_F16_F32",
    )
    return n.name == "dot_general" and usual and n.params.get("out_sharding") is None and all(map(is_float, n.inputs))
