"""Tables of an audit as text and as HTML, and bars."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def text_table(title: str, summary: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    try:
        return _rich_text(title, summary, head, cells)
    except ImportError:
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *cells)]
        return "\n".join([f"{title}: {summary}", *lines])


def _rich_text(title: str, summary: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=summary)
    for column in head:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table, markup=False)
    return captured.get()


def html_table(title: str, summary: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def row(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    body = "".join(row("td", c) for c in cells)
    return f"<p><b>{html.escape(title)}</b>: {html.escape(summary)}</p><table><thead>{row('th', head)}</thead><tbody>{body}</tbody></table>"


def bars(ax: Any, series: dict[str, dict[str, int]]) -> Any:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1]
    layers = list(dict.fromkeys(layer for s in series.values() for layer in s))
    height = 0.8 / len(series)
    for i, (label, sizes) in enumerate(series.items()):
        ax.barh([j + i * height for j in range(len(layers))], [sizes.get(n, 0) / 2**20 for n in layers], height=height, label=label)
    ax.set_yticks([j + height * (len(series) - 1) / 2 for j in range(len(layers))], layers)
    ax.invert_yaxis()
    ax.set_xlabel("kept for the backward pass, MiB")
    ax.legend()
    return ax
