"""A plan to keep less for the backward pass: for each layer what is kept, what could be, and the line to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layers.checking.audit import NO_LAYER, Residuals
from layers.checking.residuals import residuals
from layers.checking.tables import html_table, text_table
from layers.core import checks
from layers.core.readings import size


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
        self.steps = _steps(audit)

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
    return Advice(residuals(checks.function("advise", "fn", fn), *args, wrt=wrt))


def _steps(audit: Residuals) -> list[Step]:
    """One for each layer of the audit."""
    kept = audit.by_layer()
    could = {line: _among(kept, other.by_layer()) for line, other in audit.with_ways.items()}
    steps = []
    for layer, now in kept.items():
        source = next((r.source for r in audit.of_layer(layer)), "")
        way = min(could, key=lambda line, layer=layer: could[line][layer], default="")
        less = way != "" and could[way][layer] < now
        steps.append(Step(layer, now, could[way][layer] if less else now, way if less else "", source))
    return sorted(steps, key=lambda s: s.could_keep - s.kept)


def _among(layers: Iterable[str], found: dict[str, int]) -> Counter[str]:
    """The bytes of another audit by the layers of this one: a path that is not among them counts for the nearest one above it."""
    count: Counter[str] = Counter(dict.fromkeys(layers, 0))
    for path, nbytes in found.items():
        while path and path not in count:
            path = path.rpartition("/")[0]
        count[path or NO_LAYER] += nbytes
    return count
