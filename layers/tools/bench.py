"""`python -m layers bench`: each layer beside the code that people write without it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from layers.tools.measure import Measured, machine_limits, measure

RESULTS = Path(__file__).with_name("bench_results.json")


def names() -> list[str]:
    """Every name that `bench` takes."""
    from layers.tools.cases import CASES

    return ["function", *(c.name for c in CASES)]


def run(chosen: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Runs the named rows. Returns figures: seconds, spread, bytes, and the ratios to the idiomatic code."""
    from layers.tools.cases import CASES

    limits = machine_limits() if rounds else (0.0, 0.0)
    rows = [_layer_row(c, rounds, limits[0]) for c in CASES if c.name in chosen]
    return {"machine": _machine(limits), "rows": rows}


def _machine(limits: tuple[float, float]) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].platform,
        "jax": jax.__version__,
        "matmul_flops": limits[0],
        "copy_bytes": limits[1],
    }


def _layer_row(case: Any, rounds: int, matmul_flops: float) -> dict[str, Any]:
    measured = measure(case.programs(), case.args(), rounds=rounds)
    row = _row(case.name, case.work, measured, "idiomatic")
    ours = measured["ours"].seconds
    if ours and case.flops:
        row["share_of_matmul_limit"] = case.flops / ours / matmul_flops
    return row


def _row(name: str, work: str, measured: dict[str, Measured], base: str) -> dict[str, Any]:
    first = measured[base]
    ways: dict[str, Any] = {}
    for way, m in measured.items():
        ways[way] = asdict(m) | {
            "time_ratio": m.seconds / first.seconds if m.seconds and first.seconds else None,
            "temp_ratio": m.temp_bytes / first.temp_bytes if first.temp_bytes else None,
        }
    return {"name": name, "work": work, "ways": ways}


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title="forward and backward, as ratios to the idiomatic code")
    for column in ("work", "way", "time", "±", "temp memory", "temp MiB", "of matmul limit"):
        made.add_column(column)
    for row in results["rows"]:
        for i, (way, m) in enumerate(row["ways"].items()):
            limit = row.get("share_of_matmul_limit") if way == "ours" else None
            cells = (m["time_ratio"], m["spread"], m["temp_ratio"])
            made.add_row(
                row["work"] if i == 0 else "",
                way,
                *(ratio(c) for c in cells),
                f"{m['temp_bytes'] / 2**20:.1f}",
                ratio(limit),
                end_section=i == len(row["ways"]) - 1,
            )
    return made


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def markdown(results: dict[str, Any]) -> str:
    """The README's table of a result file."""
    lines = [
        "| work, forward and backward | time | temp memory | `jax.checkpoint` time | its memory | dots policy time | its memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ways = row["ways"]
        cells = [ratio(ways[w][k]) for w in ("ours", "checkpoint", "dots policy") for k in ("time_ratio", "temp_ratio")]
        lines.append(f"| {row['work']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: str) -> None:
    """Saves bars of time and memory ratios of our rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.4 * len(rows) + 2), sharey=True, layout="constrained")
    for ax, key, title in zip(axes, ("time_ratio", "temp_ratio"), ("time", "temporary memory"), strict=True):
        ax.barh([r["name"] for r in rows], [r["ways"]["ours"][key] or 0 for r in rows])
        ax.axvline(1, color="black", linewidth=1)
        ax.set_title(f"{title}, ratio to the idiomatic code")
    figure.savefig(path)
    plt.close(figure)


def main(chosen: Sequence[str], *, rounds: int = 5, json_path: str | None = None, plot_path: str | None = None) -> int:
    """Runs and prints the named rows, or all.

    Raises:
        ValueError: for a name that is no row.
    """
    known = names()
    for name in chosen:
        if name not in known:
            raise ValueError(f"bench: no row is named {name!r}; there are {', '.join(known)}")
    console = Console(width=max(Console().width, 120))
    if not chosen or "function" in chosen:
        from layers.tools.bench_function import bench_function

        console.print(bench_function())
    if list(chosen) == ["function"]:
        return 0
    results = run(chosen or known, rounds=rounds)
    console.print(table(results))
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1) + "\n")
    if plot_path:
        plot(results, plot_path)
    return 0
