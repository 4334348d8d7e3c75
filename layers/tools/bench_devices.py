"""`python -m layers bench --compile-for h100`: the temporary memory of the benchmark's rows on devices that are not here, in bfloat16.

Each row is compiled for the device, as it is there; nothing runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from layers.tools import bench_gpu_step, llama_step
from layers.tools.bench_gpu_step import BY_KERNEL, KERNELS
from layers.tools.bench_rows import MAIN_WAYS as WAYS
from layers.tools.cases.case import Case, forward_and_backward
from layers.tools.cases.goals import GOALS
from layers.tools.devices import DEVICES, compile_for

RESULTS = Path(__file__).with_name("bench_results_devices.json")
STEP = bench_gpu_step.NAME


def names() -> list[str]:
    """Every row: the layers of the benchmark, and the training step of one GPU."""
    return [*(c.name for c in _cases()), STEP]


def works() -> dict[str, str]:
    """What each row computes."""
    return {c.name: c.work for c in _cases()} | {STEP: bench_gpu_step.work()}


def _cases() -> tuple[Case, ...]:
    from layers.tools.cases import CASES, goals

    return (*CASES, *goals.CASES)


def temp_bytes(name: str, device: str, ways: Sequence[str] | None = None) -> dict[str, int]:
    """Bytes of temporary memory of these ways of a row, or of all."""
    made = _programs(name, device)
    programs = {way: compile_for(device, *made[way][:2], **made[way][2]) for way in ways or made}
    return {way: p.memory_analysis().temp_size_in_bytes for way, p in programs.items()}


def _programs(name: str, device: str) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Function, arguments and options of `jax.jit` of each way."""
    if name == STEP:
        steps = {way: llama_step.make_step(way) for way in WAYS} | {
            BY_KERNEL: llama_step.make_step("ours", implementation=KERNELS[DEVICES[device].platform])
        }
        return {way: (*step, {"donate_argnums": (0, 1)}) for way, step in steps.items()}
    case = next(c for c in _cases() if c.name == name)
    args = jax.tree.map(_in_bfloat16, jax.eval_shape(case.args))
    ways = {"idiomatic": case.idiomatic, "ours": case.ours}
    return {way: (forward_and_backward(fn), (jax.eval_shape(fn, *args), *args), {}) for way, fn in ways.items()}


def _in_bfloat16(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype)


def main(chosen: Sequence[str], device: str, *, json_path: str | None = None) -> int:
    """Compiles and prints the named rows, or all, as they are done; keeps those of other runs in the file.

    Raises:
        ValueError: for a name that is no row.
        ModuleNotFoundError: without the device's compiler.
    """
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        raise ValueError(f"bench: no row is named {unknown[0]!r}; there are {', '.join(names())}")
    console, path = Console(), None if json_path is None else Path(json_path)
    results = json.loads(path.read_text()) if path is not None and path.exists() else {}
    for name in chosen or names():
        found = temp_bytes(name, device)
        console.print(f"{name}: " + ", ".join(f"{way} {n / 2**20:.1f} MiB" for way, n in found.items()))
        results.setdefault(device, {})[name] = found | {"jax": jax.__version__}
        if path is not None:
            path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    console.print(table(results))
    return 0


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title="temporary memory as XLA plans it, bfloat16, forward and backward")
    for column in ("work", *(f"{DEVICES[d].title}, {way}, MiB" for d in results for way in WAYS)):
        made.add_column(column)
    for name in names():
        if any(name in rows for rows in results.values()):
            made.add_row(name, *_cells(results, name))
    return made


def markdown(results: dict[str, Any]) -> str:
    """The README's table of the result file, but for rows that have a goal (`goals_table.py`)."""
    lines = ["| work, forward and backward, bfloat16 | " + " | ".join(f"{DEVICES[d].title}: plain, MiB | ours, MiB | ratio" for d in results) + " |"]
    lines.append("|" + "---|" * (1 + 3 * len(results)))
    works_ = works()
    for name in names():
        if name in GOALS and name != STEP:
            continue
        cells = []
        for device, rows in results.items():
            if name not in rows:
                raise ValueError(f"{name} was not compiled for {device}: python -m layers bench {name} --compile-for {device} --json {RESULTS}")
            plain, ours = (rows[name][way] / 2**20 for way in WAYS)
            cells += [f"{plain:.0f}", f"{ours:.0f}", f"{ours / plain:.2f}" if plain >= 1 else ""]
        lines.append(f"| {works_[name]} | " + " | ".join(cells) + " |")
    steps = [f"by {KERNELS[DEVICES[d].platform]} {rows[STEP][BY_KERNEL] / 2**20:.0f} MiB on the {DEVICES[d].title}" for d, rows in results.items()]
    lines += ["", f"The training step with attention {', '.join(steps)}; without what cuDNN takes for itself, which XLA's plan does not hold."]
    return "\n".join(lines)


def _cells(results: dict[str, Any], name: str) -> list[str]:
    return ["" if name not in rows else f"{rows[name][way] / 2**20:.1f}" for rows in results.values() for way in WAYS]
