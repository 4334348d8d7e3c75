"""What an audit of a backward pass found: the arrays that it keeps, by layer, and two audits side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from layers.checking.tables import bars, html_table, text_table
from layers.core.readings import size

NO_LAYER = "(no layer)"
HEAD = ("size", "kind", "array", "layer", "made by", "source")

WAYS: dict[str, Callable[[Any, tuple[Any, ...]], tuple[Any, tuple[Any, ...], Callable[..., Any]] | None]] = {}
"""Ways to keep less, by the line that a person writes.

Each takes a function and its arguments and returns what is to be audited instead: a function, its arguments, and a transformation of the function
over their arrays; or None where there is nothing that it could change.
"""


@dataclass(frozen=True)
class Residual:
    """One array that the backward pass keeps.

    Attributes:
        kind: "argument" (alive anyway), "constant", or "extra".
        bytes: its size.
        shape, dtype: its type.
        layer: nnx module path or named scope that made it; for an argument its path in the arguments.
        operation: the JAX primitive that computes it, and the jitted function that it is in.
        source: `file:line (function)`, that of the call where it is made inside a function of JAX.
        name: its `checkpoint_name`.
        repeats: lengths of the loops that stacked it.
        used: whether the backward pass reads it.
    """

    kind: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    layer: str = ""
    operation: str = ""
    source: str = ""
    name: str = ""
    repeats: tuple[int, ...] = ()
    used: bool = True

    def cells(self, indent: bool = False) -> tuple[str, ...]:
        """The row of a table, whose size is indented below that of its layer."""
        array = f"{self.dtype}[{','.join(map(str, self.shape))}]" + "".join(f" x{n}" for n in self.repeats)
        made = self.name or self.operation + ("" if self.used else " (unused)")
        return ("  " * indent + size(self.bytes), self.kind, array, self.layer, made, self.source)


class Residuals:
    """The audit of one function; prints as a table, by layer and with what the ways of the library would keep; shows as HTML in a notebook.

    Args:
        rows: the arrays.
        title: the name of the function.
        again: audits another function, with other arguments or (None) those of this audit.
        of_way: the audit with one of the `WAYS` taken; None where it does not apply.
    """

    def __init__(
        self,
        rows: Sequence[Residual],
        title: str,
        again: Callable[[Any, Any], Residuals],
        of_way: Callable[[Any], Residuals | None] = lambda way: None,
    ):
        self.rows = sorted(rows, key=lambda r: -r.bytes)
        self.title = title
        self._again, self._of_way = again, of_way

    @cached_property
    def with_ways(self) -> dict[str, Residuals]:
        """The audits with each way to keep less taken, by the line that takes it."""
        found: dict[str, Residuals] = {}
        for line, way in WAYS.items():
            try:
                audit = self._of_way(way)
            except (TypeError, ValueError, NotImplementedError):  # a function that cannot be traced so
                audit = None
            if audit is not None:
                found[line] = audit
        return found

    @property
    def extra(self) -> int:
        """Bytes kept beyond arguments and constants."""
        return sum(r.bytes for r in self.rows if r.kind == "extra")

    @property
    def total(self) -> int:
        """Bytes kept in all."""
        return sum(r.bytes for r in self.rows)

    def by_layer(self, depth: int | None = None) -> dict[str, int]:
        """Extra bytes of each layer, largest first; `depth` cuts the paths."""
        count: Counter[str] = Counter()
        for r in self.rows:
            if r.kind == "extra":
                count["/".join(r.layer.split("/")[:depth]) or NO_LAYER] += r.bytes
        return dict(count.most_common())

    def of_layer(self, layer: str) -> list[Residual]:
        """The extra arrays of a layer, largest first."""
        return [r for r in self.rows if r.kind == "extra" and (r.layer or NO_LAYER) == layer]

    def compare(self, other: Callable[..., Any] | Residuals, *args: Any) -> Comparison:
        """Sets this audit beside another: that of another function, or one already made.

        Args:
            other: a function or an nnx module, which takes the place of the one audited here; or an audit.
            *args: its arguments; without them it gets those of this audit, differentiated by the same ones.
        """
        if isinstance(other, Residuals):
            return Comparison(self, other)
        return Comparison(self, self._again(other, args or None))

    def __str__(self) -> str:
        return text_table(self.title, self._summary(), HEAD, self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.title, self._summary(), HEAD, self._cells())

    def _summary(self) -> str:
        kinds: Counter[str] = Counter(dict.fromkeys(("extra", "argument", "constant"), 0))
        for r in self.rows:
            kinds[r.kind] += r.bytes
        unused = sum(r.bytes for r in self.rows if not r.used)
        text = ", ".join(f"{k} {size(v)}" for k, v in kinds.items())
        text += f"; never read by the backward pass: {size(unused)}" if unused else ""
        return text + "".join(f"; {line} would keep {size(audit.extra)} extra" for line, audit in self.with_ways.items())

    def _cells(self) -> list[tuple[str, ...]]:
        """The extra arrays of each layer below a line with their sum, then what is alive anyway."""
        cells: list[tuple[str, ...]] = []
        for layer, total in self.by_layer().items():
            rows = self.of_layer(layer)
            if len(rows) > 1:
                cells.append((size(total), "extra", f"{len(rows)} arrays", layer, "", ""))
            cells += [r.cells(indent=len(rows) > 1) for r in rows]
        return cells + [r.cells() for r in self.rows if r.kind != "extra"]

    def plot(self, ax: Any = None, *, depth: int | None = None) -> Any:
        """A bar for each layer's extra bytes in MiB, with matplotlib. Returns the axes."""
        return bars(ax, {self.title: self.by_layer(depth)})


class Comparison:
    """Two audits side by side."""

    def __init__(self, first: Residuals, second: Residuals):
        self.first, self.second = first, second

    @property
    def ratio(self) -> float:
        """Extra bytes of the second as a share of the first's."""
        return self.second.extra / self.first.extra if self.first.extra else float("inf" if self.second.extra else 1)

    def _cells(self) -> list[tuple[str, ...]]:
        a, b = self.first.by_layer(), self.second.by_layer()
        return [(layer, size(a.get(layer, 0)), size(b.get(layer, 0))) for layer in sorted({*a, *b}, key=lambda n: -max(a.get(n, 0), b.get(n, 0)))]

    def _parts(self) -> tuple[str, str, tuple[str, ...], list[tuple[str, ...]]]:
        title = f"{self.first.title} and {self.second.title}"
        summary = f"extra {size(self.first.extra)} and {size(self.second.extra)}, {self.ratio:.3g} of the first"
        return title, summary, ("layer", self.first.title, self.second.title), self._cells()

    def __str__(self) -> str:
        return text_table(*self._parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._parts())

    def plot(self, ax: Any = None) -> Any:
        """Two bars for each layer, in MiB."""
        return bars(ax, {f"1: {self.first.title}": self.first.by_layer(), f"2: {self.second.title}": self.second.by_layer()})
