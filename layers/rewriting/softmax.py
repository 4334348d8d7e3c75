"""exp(s - max s), and its division by its sum, along any axes and in any layout."""

from __future__ import annotations

from typing import NamedTuple

from layers.rewriting.graph import Node, Value
from layers.rewriting.walk import before_casts, row_statistic


class StableExp(NamedTuple):
    """exp(difference), difference = scores - maximum along `axes`."""

    scores: Value
    axes: tuple[int, ...]
    maximum: Value
    difference: Value


def find_stable_exp(e: Value, nodes: set[Node]) -> StableExp | None:
    if e.node is None or e.node.name != "exp":
        return None
    d = before_casts(e.node.inputs[0], inner := {e.node})
    if d.node is None or d.node.name != "sub" or d.node.inputs[0].shape != d.shape:
        return None
    scores, maximum = d.node.inputs
    axes = row_statistic(maximum, scores, "reduce_max", inner)
    if axes is None:
        return None
    nodes |= inner | {d.node}
    return StableExp(scores, axes, maximum, d)


class Softmax(NamedTuple):
    scores: Value
    axes: tuple[int, ...]
    nodes: set[Node]


def find_softmax(n: Node) -> Softmax | None:
    """The softmax that the division `n` ends, or None."""
    if n.name != "div":
        return None
    nodes = {n}
    numerator, total = n.inputs
    found = find_stable_exp(before_casts(numerator, nodes), nodes)
    if found is None or row_statistic(total, numerator, "reduce_sum", nodes) != found.axes:
        return None
    return Softmax(found.scores, found.axes, nodes)
