"""Groups of elementwise operations: each is one rule that keeps the cheapest values to compute its inside again from.

The level of an operation is the largest number of heavy ones, products and reductions, that any way to it goes through. Operations of one level that
feed each other form a group. A way that leaves a group and comes back would pass a heavy operation and raise the level, so none does, and the group
can take the place of its operations. What is read on one higher level alone, such as a mask that is drawn early, is moved up there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from layers.core import compat
from layers.rewriting.cut import cheapest, values_of
from layers.rewriting.evaluation import steps_of
from layers.rewriting.graph import Graph, Node
from layers.rewriting.kept import Kept
from layers.rewriting.match import Match
from layers.rewriting.primitives import is_light
from layers.rewriting.profit import CHOICES, freed, saved_by
from layers.rewriting.recomputed import Part, match_of


def find_elementwise(graph: Graph, matches: list[Match], named: Sequence[Match]) -> list[Match]:
    """The groups that keep less than autodiff and than the activations `named` that are inside of them; `matches` are those that stay."""
    kept = Kept(graph, matches)
    found: list[Match] = []
    for nodes in groups_of(graph, [*matches, *_apart(graph, matches, named)]):
        inside = [m for m in named if m.nodes <= nodes]
        m = _match(nodes, kept)
        taken = [m] if m is not None and m.saving > sum(freed(x) - x.keeps for x in inside) else inside
        for x in taken:
            kept.take(x)
        found += taken
    return found + [m for m in named if not any(m.nodes & x.nodes for x in found)]


def _apart(graph: Graph, matches: list[Match], named: Sequence[Match]) -> list[Match]:
    """The activations that lie in no one group."""
    groups = groups_of(graph, matches) if named else []
    return [m for m in named if not any(m.nodes <= g for g in groups)]


def groups_of(graph: Graph, matches: Sequence[Match]) -> list[set[Node]]:
    """The largest groups of light operations that feed each other and no way leaves and enters again."""
    steps = steps_of(graph, matches)
    level = _levels(steps)
    parent = {n: n for n in level}

    def root(n: Node) -> Node:
        while parent[n] is not n:
            parent[n] = n = parent[parent[n]]
        return n

    for n in level:
        for v in n.inputs:
            if v.node in level and level[v.node] == level[n]:
                parent[root(v.node)] = root(n)
    groups: dict[Node, set[Node]] = defaultdict(set)
    for n in level:
        groups[root(n)].add(n)
    return list(groups.values())


def _levels(steps: Sequence[Node | Match]) -> dict[Node, int]:
    """The levels of the light operations."""
    height: dict[int, int] = {}
    level: dict[Node, int] = {}
    for step in steps:
        below = max((height.get(id(v), 0) for v in step.inputs), default=0)
        if isinstance(step, Node) and is_light(step):
            level[step] = below
        else:
            below += 1
        height.update((id(o), below) for o in step.outputs)
    for n in reversed(list(level)):
        users = {u for o in n.outputs for u in o.users}
        above = {level.get(u, -1) for u in users}
        if len(above) == 1 and -1 not in above and not any(o.kept for o in n.outputs):
            level[n] = above.pop()
    return level


def _match(nodes: set[Node], kept: Kept) -> Match | None:
    if not any(v for n in nodes for v in saved_by(n)):
        return None
    part = Part.of(nodes, kept)
    if any(compat.is_explicit(v.aval) for v in (*part.inputs, *part.outputs)):
        return None
    before = sum(v.bytes for v in kept.only_by(nodes)) + sum(map(choices, nodes))
    needed = [v for n in nodes for v in saved_by(n)]
    free = {id(v) for v in values_of(nodes) if kept.without(v, nodes)}
    holds = cheapest(nodes, part.inputs, needed, border=[*part.inputs, *part.outputs], free=free)
    after = sum(v.bytes for v in holds if not kept.without(v, nodes)) + sum(map(choices, nodes))
    m = match_of("elementwise", nodes, part, f"{len(nodes)} operations")
    m.holds, m.frees, m.keeps, m.saving = holds, before, after, before - after
    return m


def choices(n: Node) -> int:
    """The bytes that say which operand a maximum is."""
    return n.out.size if n.name in CHOICES and any(v.differentiated for v in n.inputs) else 0
