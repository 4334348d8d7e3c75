"""What `check` reports: a row for each clause of the contract."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One clause: "passed", "failed" or "skipped", and the figure or the reason."""

    clause: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found; prints as a table, shows as HTML in a notebook."""

    name: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(r.outcome != "failed" for r in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the clauses that failed."""
        failed = [f"{r.clause}: {r.detail}" for r in self.rows if r.outcome == "failed"]
        if failed:
            raise AssertionError(f"{self.name} breaks its contract:\n" + "\n".join(failed))

    def __str__(self) -> str:
        width = max(len(r.clause) for r in self.rows)
        lines = [f"{self.name}: {'passed' if self.passed else 'FAILED'}"]
        return "\n".join(lines + [f"  {r.clause:{width}}  {r.outcome:7}  {r.detail.splitlines()[0] if r.detail else ''}".rstrip() for r in self.rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(r.clause)}</td><td>{r.outcome}</td><td><pre>{html.escape(r.detail)}</pre></td></tr>" for r in self.rows
        )
        verdict = "passed" if self.passed else "FAILED"
        return f"<p><b>{html.escape(self.name)}</b>: {verdict}</p><table>{cells}</table>"


class Skip(Exception):
    """A clause that does not apply."""


def run_clause(title: str, clause: Callable[[Any], str | None], subject: Any) -> Row:
    try:
        return Row(title, "passed", clause(subject) or "")
    except Skip as reason:
        return Row(title, "skipped", str(reason))
    except Exception as error:
        return Row(title, "failed", f"{type(error).__name__}: {error}")
