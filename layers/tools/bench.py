"""`python -m layers bench`: each layer beside the code that people write without it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from layers.core.machine import on_accelerator
from layers.tools.bench_rows import as_row, layer_row, merged
from layers.tools.bench_tables import line, plot, table
from layers.tools.measure import machine_limits

RESULTS, GPU_RESULTS = (Path(__file__).with_name(f"bench_results{device}.json") for device in ("", "_gpu"))
QUICK = (
    "attention",
    "linear_cross_entropy",
    "softmax_cross_entropy",
    "rms_norm",
    "gated_mlp",
    "grouped_matmul",
    "fp8_linear",
    "gated_linear_attention",
)
"""What `--quick` runs: one layer of each kind of work."""
QUICK_ROUNDS, QUICK_MINUTES = 2, 4.0


@dataclass(frozen=True)
class Plan:
    """How rows are run.

    Attributes:
        rounds: how often each way is timed; 0 only compiles.
        dtype: of the floating-point arguments; None for that of each row.
        apart: whether to time forward and backward as two programs too.
        main_ways: whether to leave out all ways but the idiomatic one and ours.
        minutes: after which no row is begun.
    """

    rounds: int = 5
    dtype: str | None = None
    apart: bool = False
    main_ways: bool = False
    minutes: float = float("inf")


def names(size: str = "all") -> list[str]:
    """Every name that `bench` takes, or those of one size, "cpu" or "gpu"."""
    from layers.tools import bench_gpu_step, bench_step
    from layers.tools.cases import CASES, goals

    cpu = ["function", *(c.name for c in CASES), *(f"training_step_{s}" for s in bench_step.STACKS)]
    gpu = [*(c.name for c in goals.CASES), bench_gpu_step.NAME]
    return {"cpu": cpu, "gpu": gpu, "all": cpu + gpu}[size]


def rows(chosen: Sequence[str], plan: Plan, limits: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """The named rows, each as soon as it is measured: seconds, spread, bytes, and the ratios to the idiomatic code."""
    from layers.tools import bench_gpu_step, bench_step
    from layers.tools.cases import CASES, goals

    for case in (*CASES, *goals.CASES):
        if case.name in chosen:
            dtype = plan.dtype or ("bfloat16" if case in goals.CASES else "float32")
            yield layer_row(case, dtype=dtype, rounds=plan.rounds, limits=limits, apart=plan.apart, main_ways=plan.main_ways)
    for stack in bench_step.STACKS:
        if f"training_step_{stack}" in chosen:
            yield from (as_row(*row) for row in bench_step.rows(rounds=plan.rounds, stacks=(stack,)))
    if bench_gpu_step.NAME in chosen:
        yield as_row(*bench_gpu_step.row(plan.rounds)) | {"dtype": "bfloat16"}


def _machine(limits: tuple[float, float]) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_flops": limits[0],
        "copy_bytes": limits[1],
    }


def main(chosen: Sequence[str], plan: Plan | None = None, *, size: str = "cpu", json_path: str | None = None, plot_path: str | None = None) -> int:
    """Runs the named rows, or all of a size, prints each as soon as it is measured and puts it into the file.

    Raises:
        ValueError: for a name that is no row.
    """
    for name in chosen:
        if name not in names():
            raise ValueError(f"bench: no row is named {name!r}; there are {', '.join(names())}")
    plan, chosen = plan or Plan(), chosen or names(size)
    console, end = Console(width=max(Console().width, 120)), time.monotonic() + 60 * plan.minutes
    if "function" in chosen:
        from layers.tools.bench_function import bench_function

        console.print(bench_function())
    if list(chosen) == ["function"]:
        return 0
    limits = machine_limits() if plan.rounds else (0.0, 0.0)
    results: dict[str, Any] = {"machine": _machine(limits), "rows": []}
    for row in _in_time(rows(chosen, plan, limits), end):
        console.print(line(row), markup=False, soft_wrap=True)
        results["rows"].append(row)
        if json_path:
            _keep(results, Path(json_path))
    console.print(table(results))
    if len(results["rows"]) < len(set(chosen) - {"function"}):
        console.print(f"{plan.minutes:g} minutes are over: the other rows were not begun")
    if plot_path:
        whole = json.loads(Path(json_path).read_text()) if json_path else results
        plot(whole, plot_path)
    return 0


def quick() -> Plan:
    """What `--quick` means: the time of each row once as people run it, in `QUICK_MINUTES`."""
    return Plan(QUICK_ROUNDS, "bfloat16" if on_accelerator() else None, main_ways=True, minutes=QUICK_MINUTES)


def _in_time(found: Iterator[dict[str, Any]], end: float) -> Iterator[dict[str, Any]]:
    """The rows that are begun before `end`."""
    while time.monotonic() < end and (row := next(found, None)) is not None:
        yield row


def _keep(results: dict[str, Any], path: Path) -> None:
    """Puts the rows into a file, beside those of other runs that it holds."""
    if path.exists():
        results = merged(results, json.loads(path.read_text()), names())
    path.write_text(json.dumps(results, indent=1) + "\n")
