"""The patterns by name, in the order in which they are looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from layers.rewriting.activations import find_activation
from layers.rewriting.attention import find_attention
from layers.rewriting.cross_entropy import find_cross_entropy
from layers.rewriting.elementwise import find_elementwise
from layers.rewriting.graph import Graph, Node
from layers.rewriting.match import Match, Nearly, obstacle
from layers.rewriting.mlp import find_mlp
from layers.rewriting.norms import find_norm
from layers.rewriting.products import find_products
from layers.rewriting.profit import pays

BY_MIDDLE: dict[str, Callable[[Node], Match | Sequence[Match] | None]] = {
    "attention": find_attention,
    "cross_entropy": find_cross_entropy,
    "norm": find_norm,
    "mlp": find_mlp,
    "activation": find_activation,
}
"""Those that are found from an operation in their middle."""
PATTERNS = (*BY_MIDDLE, "elementwise", "product")


@dataclass(frozen=True)
class Miss:
    """A part that nearly fitted a pattern: its middle, and why it did not."""

    pattern: str
    node: Node
    reason: str


@dataclass
class Found:
    """The matches of a graph that are taken, and what nearly was."""

    matches: list[Match] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


def find_all(graph: Graph, names: Sequence[str]) -> Found:
    found, taken = Found(), set()
    for name in (n for n in names if n in BY_MIDDLE):
        for n in graph.nodes:
            if n in taken:
                continue
            reasons = []
            for m in _candidates(name, n, reasons):
                m.pattern = name
                why_not = obstacle(graph, m, taken)
                if why_not == "" and pays(m):
                    found.matches.append(m)
                    taken |= m.nodes
                    break
                if why_not is not None:
                    reasons.append(why_not or f"it would keep more than it frees, by {-m.saving} bytes")
            else:
                found.misses += [Miss(name, n, reasons[0])] if reasons else []
    if "elementwise" in names:
        named = [m for m in found.matches if m.pattern == "activation"]
        rest = [m for m in found.matches if m not in named]
        found.matches = rest + find_elementwise(graph, rest, named)
    if "product" in names:
        found.matches += find_products(graph, found.matches)
    return found


def _candidates(name: str, n: Node, reasons: list[str]) -> Iterator[Match]:
    try:
        matches = BY_MIDDLE[name](n)
    except Nearly as miss:
        reasons.append(str(miss))
        return
    yield from [matches] if isinstance(matches, Match) else matches or []
