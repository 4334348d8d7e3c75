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

from layers.core.machine import on_accelerator
from layers.tools.measure import Measured, machine_limits, measure

RESULTS, GPU_RESULTS = (Path(__file__).with_name(f"bench_results{device}.json") for device in ("", "_gpu"))


def names() -> list[str]:
    """Every name that `bench` takes."""
    from layers.tools.bench_step import STACKS
    from layers.tools.cases import CASES

    return ["function", *(c.name for c in CASES), *(f"training_step_{s}" for s in STACKS)]


def run(chosen: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Runs the named rows. Returns figures: seconds, spread, bytes, and the ratios to the idiomatic code."""
    from layers.tools import bench_step
    from layers.tools.cases import CASES

    limits = machine_limits() if rounds else (0.0, 0.0)
    rows = [_layer_row(c, rounds, limits) for c in CASES if c.name in chosen]
    stacks = tuple(s for s in bench_step.STACKS if f"training_step_{s}" in chosen)
    rows += [_row(name, work, measured) for name, work, measured in bench_step.rows(rounds=rounds, stacks=stacks)]
    return {"machine": _machine(limits), "rows": rows}


def merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """`new`, with the rows of `old` that were not run again, in the order of `names`; a row that was only compiled keeps its times."""
    before = {r["name"]: r for r in old["rows"]}
    rows = before | {r["name"]: _with_times(r, before.get(r["name"])) for r in new["rows"]}
    machine = new["machine"] if new["machine"]["matmul_flops"] or not old["machine"] else old["machine"]
    return {"machine": machine, "rows": [rows[n] for n in names() if n in rows]}


def _with_times(row: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """The row, with what only a run can tell from `before` where it was only compiled."""
    if before is None or row["ways"]["idiomatic"]["seconds"] is not None:
        return row
    timed = ("seconds", "spread", "time_ratio", "resident_bytes", "resident_ratio")
    ways = {w: m | {k: before["ways"].get(w, {}).get(k) for k in timed} for w, m in row["ways"].items()}
    return before | row | {"ways": ways | {w: m for w, m in before["ways"].items() if m["temp_bytes"] is None}}  # peers are not compiled


def _machine(limits: tuple[float, float]) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_flops": limits[0],
        "copy_bytes": limits[1],
    }


def _layer_row(case: Any, rounds: int, limits: tuple[float, float]) -> dict[str, Any]:
    measured = measure(
        case.programs(),
        case.arguments(),
        rounds=min(case.rounds or rounds, rounds),
        runners=case.runners() if rounds and not on_accelerator() else None,
    )
    row = _row(case.name, case.work, measured)
    ours = measured["ours"]
    if ours.seconds and limits[0]:
        row["share_of_limit"] = max(case.flops / limits[0], (ours.least_bytes or 0) / limits[1]) / ours.seconds
    return row


def _row(name: str, work: str, measured: dict[str, Measured]) -> dict[str, Any]:
    first = measured["idiomatic"]
    ways: dict[str, Any] = {}
    for way, m in measured.items():
        pairs = {"time": (m.seconds, first.seconds), "temp": (m.temp_bytes, first.temp_bytes), "resident": (m.resident_bytes, first.resident_bytes)}
        ways[way] = asdict(m) | {f"{key}_ratio": None if value is None or not base else value / base for key, (value, base) in pairs.items()}
    return {"name": name, "work": work, "ways": ways}


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title="forward and backward, as ratios to the idiomatic code")
    for column in ("work", "way", "time", "±", "temp memory", "temp MiB", "peak resident", "of the machine's limit"):
        made.add_column(column)
    for row in results["rows"]:
        for i, (way, m) in enumerate(row["ways"].items()):
            temp = m["temp_bytes"]
            made.add_row(
                row["work"] if i == 0 else "",
                way,
                *(ratio(m[key]) for key in ("time_ratio", "spread", "temp_ratio")),
                "" if temp is None else f"{temp / 2**20:.1f}",
                ratio(m["resident_ratio"]),
                ratio(row.get("share_of_limit") if way == "ours" else None),
                end_section=i == len(row["ways"]) - 1,
            )
    return made


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


RIVALS = ("ours", "checkpoint", "dots policy")


def markdown(results: dict[str, Any]) -> str:
    """The README's tables of a result file: each layer, then the whole training step."""
    steps = [r for r in results["rows"] if r["name"].startswith("training_step")]
    lines = [
        "| work, forward and backward | time | temp memory | of the limit | `jax.checkpoint` time | its memory "
        "| dots policy time | its memory | others |",
        "|" + 9 * "---|",
    ]
    for row in results["rows"]:
        if row in steps:
            continue
        ways = row["ways"]
        cells = [cell for w in RIVALS for cell in (ratio(ways[w]["time_ratio"]), _temp_ratio(ways[w], ways["idiomatic"]))]
        cells.insert(2, ratio(row.get("share_of_limit")))
        lines.append(f"| {row['work']} | " + " | ".join(cells) + f" | {_others(ways)} |")
    for row in steps:
        lines += ["", f"{row['work']}:", "", "| | time | temp memory | peak resident memory |", "|---|---|---|---|"]
        lines += [f"| {w} | " + " | ".join(ratio(m[f"{k}_ratio"]) for k in ("time", "temp", "resident")) + " |" for w, m in row["ways"].items()]
    return "\n".join(lines)


def _others(ways: dict[str, Any]) -> str:
    others = [(w, m) for w, m in ways.items() if w not in (*RIVALS, "idiomatic")]
    return "; ".join(
        f"{w} {ratio(m['time_ratio'])} time" + (f", {memory} memory" if (memory := _temp_ratio(m, ways["idiomatic"])) else "") for w, m in others
    )


def _temp_ratio(m: dict[str, Any], idiomatic: dict[str, Any]) -> str:
    """Of the temporary memory of two programs; nothing where both take next to none."""
    return "" if m["temp_bytes"] is None or max(m["temp_bytes"], idiomatic["temp_bytes"]) < 2**20 else ratio(m["temp_ratio"])


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
        before = Path(json_path)
        if before.exists():
            results = merged(results, json.loads(before.read_text()))
        before.write_text(json.dumps(results, indent=1) + "\n")
    if plot_path:
        plot(results, plot_path)
    return 0
