"""The README's table of goals: what a layer of the size that people train on one GPU is to reach there, and what was reached.

Memory is what XLA plans for the H100, compiled without one; time is that of the result file of a GPU, and "not run" where none was there.
"""

from __future__ import annotations

import json
from typing import Any

from layers.tools import bench, bench_devices
from layers.tools.cases.goals import GOALS, Goal

DEVICE = "h100"
NOT_RUN = "not run"


def markdown(compiled: dict[str, Any], timed: dict[str, Any]) -> str:
    """The table.

    Args:
        compiled: the rows of one device of the result file of `bench --compile-for`.
        timed: the result file of `bench` on a GPU.
    """
    times = {r["name"]: r["ways"] for r in timed["rows"] if r["name"] in GOALS}
    works = bench_devices.works()
    lines = [
        "| work, forward and backward, bfloat16 | goal, ms | reached, ms | of the plain code, ms | goal, GB | compiled, GB | of the plain code, GB |",
        "|" + 7 * "---|",
    ]
    for name, goal in GOALS.items():
        for way in (w for w in compiled[name] if w.startswith("ours")):
            lines.append(f"| {works[name]}{way.removeprefix('ours')} | {_cells(goal, compiled[name], times.get(name), way)} |")
    return "\n".join(lines)


def _cells(goal: Goal, memory: dict[str, Any], ways: dict[str, Any] | None, way: str) -> str:
    ours, plain = (NOT_RUN if ways is None or w not in ways else f"{1e3 * ways[w]['seconds']:.3g}" for w in (way, "idiomatic"))
    limit = "" if goal.gigabytes is None else f"{goal.gigabytes:g}" + (", missed" if memory[way] > 1e9 * goal.gigabytes else "")
    return " | ".join((f"{goal.milliseconds:g}", ours, plain, limit, *(f"{memory[w] / 1e9:.3f}" for w in (way, "idiomatic"))))


def table() -> str:
    """The table of the result files that are committed."""
    return markdown(json.loads(bench_devices.RESULTS.read_text())[DEVICE], json.loads(bench.GPU_RESULTS.read_text()))
