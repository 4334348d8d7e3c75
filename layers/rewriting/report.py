"""What `rewrite` did: each part that was replaced or nearly was, where it is in the source, and the bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from layers.checking.producers import clean_scope
from layers.core import compat
from layers.core.readings import size
from layers.rewriting.graph import Graph, Node
from layers.rewriting.match import Match
from layers.rewriting.patterns import Miss
from layers.rewriting.profit import freed

_OTHERS = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    *(os.sep + os.path.join("site-packages", name) + os.sep for name in ("flax", "equinox", "optax", "haiku")),
)
"""Where source lines are that say little."""


@dataclass(frozen=True)
class Row:
    """One part.

    Attributes:
        name: the function of this library that took its place; or the pattern that it nearly fitted.
        layer: the named scopes around it, and the loops that it is in.
        source: `file:line (function)`.
        detail: what was read off.
        before, after: the bytes of its inside that are kept for the backward pass, plain and replaced.
        reason: why it was left, or "" where it was replaced.
    """

    name: str
    layer: str
    source: str
    detail: str = ""
    before: int = 0
    after: int = 0
    reason: str = ""

    @staticmethod
    def of_match(m: Match, place: tuple[str, ...]) -> Row:
        return Row(m.name, _layer(m.last, place), _source(m.last), m.detail, freed(m) if m.frees is None else m.frees, m.keeps)

    @staticmethod
    def of_miss(m: Miss, place: tuple[str, ...]) -> Row:
        return Row(m.pattern, _layer(m.node, place), _source(m.node), reason=m.reason)


class RewriteReport:
    """What was replaced in a function and what was left; prints as a table."""

    def __init__(self, title: str, rows: list[Row], note: str = ""):
        self.title, self.rows, self.note = title, rows, note

    @property
    def replaced(self) -> list[Row]:
        return [r for r in self.rows if not r.reason]

    @property
    def left(self) -> list[Row]:
        """The parts that nearly fitted a pattern."""
        return [r for r in self.rows if r.reason]

    @property
    def before(self) -> int:
        """Bytes of the insides of what was replaced that autodiff would keep."""
        return sum(r.before for r in self.rows)

    @property
    def after(self) -> int:
        """Bytes that are kept in their place."""
        return sum(r.after for r in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.title}: replaced {len(self.replaced)} parts, {size(self.before)} kept inside of them become {size(self.after)}"]
        lines += [f"  {r.name} ({r.detail}) at {_where(r)}: {size(r.before)} -> {size(r.after)}" for r in self.replaced]
        lines += [f"  left, nearly {r.name}, at {_where(r)}: {r.reason}" for r in self.left]
        return "\n".join([*lines, self.note] if self.note else lines)

    __repr__ = __str__


def note_of(graph: Graph) -> str:
    """What is to be said of a function as a whole."""
    if any("transpose(" in str(n.stack) for n in graph.nodes):
        return "  a backward pass is in it already, of whose forward pass little is found: jax.grad(layers.rewrite(loss)), not the other way round"
    return ""


def _where(r: Row) -> str:
    return f"{r.layer} {r.source}".strip() or "an unknown place"


def _layer(n: Node, place: tuple[str, ...]) -> str:
    return " ".join(x for x in (*(f"in {p}:" for p in place), clean_scope([str(n.stack)])) if x)


def _source(n: Node) -> str:
    frames = compat.source_frames(n.eqn)
    own = [f for f in frames if not any(part in f[0] for part in _OTHERS)] or frames
    return f"{os.path.basename(own[0][0])}:{own[0][1]} ({own[0][2]})" if own else ""
