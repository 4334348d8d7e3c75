"""A plan to keep less for the backward pass: for each layer what is kept, what could be, and the line to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from layers.check.audit import Residuals
from layers.check.residuals import residuals
from layers.check.tables import html_table, size, text_table


@dataclass(frozen=True)
class Step:
    """What is to be done for one layer.

    Attributes:
        layer: its path, as in the audit.
        kept: bytes that it keeps now.
        could_keep: bytes with the best way taken.
        way: the line to write; "" where nothing of the library keeps less.
        source: the line of the model that makes the largest array.
    """

    layer: str
    kept: int
    could_keep: int
    way: str
    source: str


class Advice:
    """The plan for one function; prints as a table, shows as HTML in a notebook.

    Attributes:
        audit: what is kept now.
        steps: one entry for each layer, the largest saving first.
        best: the line that keeps least in all; "" where no way keeps less.
    """

    def __init__(self, audit: Residuals):
        self.audit = audit
        totals = {line: other.extra for line, other in audit.with_ways.items() if other.extra < audit.extra}
        self.best = min(totals, key=totals.__getitem__, default="")
        self.steps = sorted((_step(audit, layer, kept) for layer, kept in audit.by_layer().items()), key=lambda s: s.could_keep - s.kept)

    def __str__(self) -> str:
        return text_table(f"advice for {self.audit.title}", self._summary(), _HEAD, self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(f"advice for {self.audit.title}", self._summary(), _HEAD, self._cells())

    def _summary(self) -> str:
        text = f"kept now: {size(self.audit.extra)}"
        for line, other in self.audit.with_ways.items():
            text += f"; with {line}: {size(other.extra)}"
        return text + (f". Write {self.best}" if self.best else ". Nothing here would keep less")

    def _cells(self) -> list[tuple[str, ...]]:
        return [(s.layer, size(s.kept), size(s.could_keep), s.way, s.source) for s in self.steps]


_HEAD = ("layer", "kept", "could keep", "by", "largest array made at")


def advise(fn: Callable[..., Any], *args: Any, wrt: int | Sequence[int] | None = None) -> Advice:
    """Says what would make the backward pass of `fn(*args)` keep less, layer by layer.

    Args:
        fn, *args, wrt: as for `layers.residuals`; nothing is computed, and no module is changed.

    Returns:
        The plan: print it, or read `.steps` and `.best`.

    Raises:
        TypeError, ValueError: as `layers.residuals`.
    """
    return Advice(residuals(fn, *args, wrt=wrt))


def _step(audit: Residuals, layer: str, kept: int) -> Step:
    source = next((r.source for r in audit.of_layer(layer)), "")
    could = {line: other.by_layer().get(layer, 0) for line, other in audit.with_ways.items()}
    way = min(could, key=could.__getitem__, default="")
    if not way or could[way] >= kept:
        return Step(layer, kept, kept, "", source)
    return Step(layer, kept, could[way], way, source)
