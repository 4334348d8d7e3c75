"""A part of a graph for which this library has a better rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from layers.core import compat
from layers.rewriting.graph import Graph, Node, Value

T = TypeVar("T")


class Nearly(Exception):
    """Raised by a pattern that found its middle, but then something that does not fit; the text says what."""


def need(condition: Any, reason: str) -> None:
    """Raises Nearly where the condition does not hold."""
    if not condition:
        raise Nearly(reason)


def given(x: T | None, reason: str) -> T:
    """`x`; raises Nearly where it is None."""
    if x is None:
        raise Nearly(reason)
    return x


@dataclass(eq=False)
class Match:
    """What a pattern found.

    Attributes:
        name: of the function of this library that takes the place.
        nodes: the operations that it explains.
        inputs: the values that it reads.
        outputs: those that it makes.
        run: computes the outputs as a list from the inputs.
        keeps: the bytes that its rule keeps beyond its inputs and outputs, and those that its backward needs beyond what the plain one does.
        detail: what was read off, in words.
        holds: the values of the graph that its rule saves; its inputs if not given.
        frees: the bytes of its inside that autodiff keeps; None to count them.
        saving: the bytes that it frees, less those that it keeps.
        pattern: the name of the pattern that found it.
    """

    name: str
    nodes: set[Node]
    inputs: list[Value]
    outputs: list[Value]
    run: Callable[..., Sequence[Any]]
    keeps: int = 0
    detail: str = ""
    holds: list[Value] = field(default_factory=list)
    frees: int | None = None
    saving: int = field(default=0, init=False)
    pattern: str = field(default="", init=False)

    def __post_init__(self):
        self.holds = self.holds or list(self.inputs)

    @property
    def last(self) -> Node:
        """The last of its nodes that makes an output, whose place in the source is that of the match."""
        return max((o.node for o in self.outputs if o.node is not None), key=lambda n: n.place)


def escaping(nodes: set[Node], outputs: Iterable[Value]) -> Value | None:
    """A value made inside, and not an output, that something outside reads; or None."""
    allowed = {id(o) for o in outputs}
    for n in sorted(nodes, key=lambda n: n.place):
        for o in n.outputs:
            if id(o) not in allowed and (o.kept or any(u not in nodes for u in o.users)):
                return o
    return None


def interior(nodes: set[Node], outputs: Sequence[Value]) -> set[Node]:
    """Those nodes that only serve the outputs; what is read elsewhere too stays outside, and is computed there."""
    makers = {o.node for o in outputs}
    while True:
        out = {n for n in nodes if n not in makers and any(o.kept or any(u not in nodes for u in o.users) for o in n.outputs)}
        if not out:
            return nodes
        nodes = nodes - out


def closes_a_loop(graph: Graph, m: Match) -> bool:
    """Whether something that the match reads is computed from something that it makes."""
    reached = {id(o) for o in m.outputs}
    start = min(o.node.place for o in m.outputs if o.node is not None)
    for n in graph.nodes[start:]:
        if n not in m.nodes and any(id(v) in reached for v in n.inputs):
            reached.update(id(o) for o in n.outputs)
    return any(id(v) in reached for v in m.inputs)


def obstacle(graph: Graph, m: Match, taken: set[Node]) -> str | None:
    """Why a match cannot be taken; "" where it can, None where another one has its place."""
    if m.nodes & taken:
        return None
    if any(compat.is_explicit(v.aval) for v in (*m.inputs, *m.outputs)):
        return "it is sharded over explicit axes of a mesh"
    if any(n.eqn.effects for n in m.nodes):
        return "it holds an operation with side effects"
    if (outside := escaping(m.nodes, m.outputs)) is not None:
        made = outside.node.name if outside.node is not None else "argument"
        return f"a value inside ({made}, {outside.dtype}{list(outside.shape)}) is read elsewhere too"
    return "what it reads is computed from what it makes" if len(m.outputs) > 1 and closes_a_loop(graph, m) else ""
