"""What is kept for the backward pass of a graph, and by whom: by operations as autodiff derives them, by matches as their rules do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from layers.rewriting.graph import Graph, Node, Value
from layers.rewriting.match import Match
from layers.rewriting.profit import saved_by


class Kept:
    """Knows of each value what keeps it."""

    def __init__(self, graph: Graph, matches: Sequence[Match]):
        self._keepers: dict[int, set[Any]] = defaultdict(set)
        for n in graph.nodes:
            for v in saved_by(n):
                self._keepers[id(v)].add(n)
        for m in matches:
            self.take(m)

    def take(self, m: Match) -> None:
        """Notes that the rule of a match keeps what it does, and its operations nothing any more."""
        for n in m.nodes:
            for v in saved_by(n):
                self._keepers[id(v)].discard(n)
        for v in m.holds:
            self._keepers[id(v)].add(m)

    def replace(self, v: Value, keepers: Collection[Node], values: Collection[Value]) -> None:
        """Notes that these operations, which keep `v`, keep other values in its place."""
        self._keepers[id(v)].difference_update(keepers)
        for x in values:
            self._keepers[id(x)].update(keepers)

    def without(self, v: Value, nodes: Collection[Node]) -> bool:
        """Whether a value is there in the backward pass even where these operations keep nothing."""
        return v.is_lasting or any(k not in nodes for k in self._keepers[id(v)])

    def only_by(self, nodes: Collection[Node]) -> list[Value]:
        """The values that these operations keep, and nothing else."""
        found = {id(v): v for n in nodes for v in saved_by(n) if not self.without(v, nodes)}
        return list(found.values())
