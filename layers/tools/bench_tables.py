"""The results of the benchmark, for a terminal, for the README, and as a picture."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from layers.tools.cases.goals import GOALS

RIVALS = ("ours", "checkpoint", "dots policy")


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title="forward and backward, as ratios to the idiomatic code")
    for column in ("work", "way", "time", "±", "time apart", "temp memory", "temp MiB", "peak resident", "of the machine's limit"):
        made.add_column(column)
    for row in results["rows"]:
        for i, (way, m) in enumerate(row["ways"].items()):
            temp = m["temp_bytes"]
            made.add_row(
                _work(row) if i == 0 else "",
                way,
                *(ratio(m.get(key)) for key in ("time_ratio", "spread", "apart_ratio", "temp_ratio")),
                "" if temp is None else f"{temp / 2**20:.1f}",
                ratio(m["resident_ratio"]),
                ratio(row.get("share_of_limit") if way == "ours" else None),
                end_section=i == len(row["ways"]) - 1,
            )
    return made


def line(row: dict[str, Any]) -> str:
    """One row in words: milliseconds and MiB of each way."""
    ways = (f"{way} {_figures(m)}" for way, m in row["ways"].items())
    return f"{row['name']}, {row.get('dtype', 'float32')}: " + "; ".join(ways)


def _figures(m: dict[str, Any]) -> str:
    units = {"seconds": (1e3, "ms"), "apart_seconds": (1e3, "ms apart"), "temp_bytes": (2**-20, "MiB")}
    return ", ".join(f"{m[key] * factor:.3g} {unit}" for key, (factor, unit) in units.items() if m.get(key) is not None)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def markdown(results: dict[str, Any]) -> str:
    """The README's tables of a result file: each layer, then the whole training step."""
    steps = [r for r in results["rows"] if r["name"].startswith("training_step")]
    goals = [r for r in results["rows"] if r["name"] in GOALS]
    lines = [
        "| work, forward and backward | time | temp memory | of the limit | `jax.checkpoint` time | its memory "
        "| dots policy time | its memory | others |",
        "|" + 9 * "---|",
    ]
    for row in results["rows"]:
        if row in steps or row in goals:
            continue
        ways = row["ways"]
        cells = [cell for w in RIVALS for cell in (ratio(ways[w]["time_ratio"]), _temp_ratio(ways[w], ways["idiomatic"]))]
        cells.insert(2, ratio(row.get("share_of_limit")))
        lines.append(f"| {_work(row)} | " + " | ".join(cells) + f" | {_others(ways)} |")
    for row in steps:
        if row in goals:
            continue
        lines += ["", f"{row['work']}:", "", "| | time | temp memory | peak resident memory |", "|---|---|---|---|"]
        lines += [f"| {w} | " + " | ".join(ratio(m[f"{k}_ratio"]) for k in ("time", "temp", "resident")) + " |" for w, m in row["ways"].items()]
    return "\n".join(lines)


def _work(row: dict[str, Any]) -> str:
    return row["work"] + ("" if row.get("dtype", "float32") == "float32" else f", {row['dtype']}")


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
