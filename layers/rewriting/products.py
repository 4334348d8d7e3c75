"""Products of matrices and convolutions that keep what an operand is made from, where that costs less than the operand.

The derivative of a product reads its operands. Where one is a cast, a transpose or an elementwise function of values that are alive anyway, or of
fewer bytes, the product and these operations become one rule that keeps those values and makes the operand again. All products that read an operand
do so, or one of them would keep it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from layers.core import compat
from layers.rewriting.cut import cheapest
from layers.rewriting.graph import Graph, Node, Value
from layers.rewriting.kept import Kept
from layers.rewriting.match import Match
from layers.rewriting.primitives import is_light
from layers.rewriting.profit import PRODUCTS, saved_by
from layers.rewriting.recomputed import Part, between, match_of

LARGEST = 64
"""The operations that an operand is made by."""
SAME_MEMORY = frozenset({"reshape", "squeeze", "expand_dims"})
"""What these make lies where their argument does; so does a transpose of what a product or a rule makes, which is laid out as it is read."""


@dataclass(frozen=True, eq=False)
class Operand:
    """How an operand is made again.

    Attributes:
        nodes: the operations, in order.
        saving: the bytes that are kept less; the first of the products that read it counts them.
        first: that product.
    """

    nodes: list[Node]
    saving: int
    first: Node


def find_products(graph: Graph, matches: Sequence[Match]) -> list[Match]:
    """The products that become rules beside `matches`."""
    kept, operands = Kept(graph, matches), {}
    closed = {n for m in matches if m.pattern not in ("elementwise", "activation") for n in m.nodes}
    hidden = {id(o) for m in matches for n in m.nodes for o in n.outputs} - {id(o) for m in matches for o in m.outputs}
    readers: dict[Value, set[Node]] = defaultdict(set)
    for n in graph.nodes:
        if n.name in PRODUCTS and n not in closed and not any(compat.is_explicit(v.aval) for v in (*n.inputs, n.out)):
            for v in saved_by(n):
                readers[v].add(n)
    for v, several in readers.items():
        if v.node is not None and not kept.without(v, several):
            found = _operand(v, several, kept, closed, hidden)
            if found is not None:
                operands[v] = found
    products = dict.fromkeys(n for v in operands for n in readers[v])
    return [_match(n, operands) for n in sorted(products, key=lambda n: n.place)]


def _operand(v: Value, readers: set[Node], kept: Kept, closed: Collection[Node], hidden: Collection[int]) -> Operand | None:
    """How `v` is made again where that saves bytes; `hidden` are the ids of values that no one but a rule knows."""
    nodes = _makers(v, readers, kept, closed)
    made = {id(o) for n in nodes for o in n.outputs}
    starts = [x for n in nodes for x in n.inputs if id(x) not in made and x.const is None]
    free = {id(x) for n in nodes for x in (*n.inputs, *n.outputs) if kept.without(x, readers)}
    holds = cheapest(nodes, starts, [v], border=[*starts, v], free=free, barred=hidden)
    saving, nodes = v.bytes - sum(x.bytes for x in holds if id(x) not in free), between(nodes, holds, [v])
    moves = SAME_MEMORY if all(x.node is None or is_light(x.node) for x in holds) else SAME_MEMORY | {"transpose"}
    if saving <= 0 or all(n.name in moves for n in nodes):
        return None
    kept.replace(v, readers, holds)
    return Operand(nodes, saving, min(readers, key=lambda n: n.place))


def _makers(v: Value, readers: set[Node], kept: Kept, closed: Collection[Node]) -> list[Node]:
    """The light operations that `v` is made by, back to what is alive anyway, in order."""
    found: dict[Node, None] = {}
    todo = [v]
    while todo and len(found) < LARGEST:
        x = todo.pop(0)
        if x.node is None or x.node in found or x.node in closed or not is_light(x.node) or (x is not v and kept.without(x, readers)):
            continue
        found[x.node] = None
        todo += x.node.inputs
    return sorted(found, key=lambda n: n.place)


def _match(n: Node, operands: Mapping[Value, Operand]) -> Match:
    made = [operands[v] for v in dict.fromkeys(n.inputs) if v in operands]
    nodes = sorted({n, *(x for o in made for x in o.nodes)}, key=lambda n: n.place)
    part = Part(nodes, Part.inputs_of(nodes), [n.out], frozenset(range(len(Part.inputs_of(nodes)))))
    names = ", ".join(dict.fromkeys(x.name for o in made for x in o.nodes))
    m = match_of("product", {n}, part, f"operands made again by {names}")
    m.frees = m.saving = sum(o.saving for o in made if o.first is n)
    return m
