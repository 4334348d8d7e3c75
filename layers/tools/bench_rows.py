"""The rows of the benchmark as they are kept in result files, and how those of two runs become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from layers.core.machine import on_accelerator
from layers.tools.cases.case import Case
from layers.tools.measure import Measured, measure

MAIN_WAYS = ("idiomatic", "ours")
TIMED = ("seconds", "spread", "time_ratio", "apart_seconds", "apart_ratio", "resident_bytes", "resident_ratio")
"""What only a run can tell."""


def layer_row(case: Case, *, dtype: str, rounds: int, limits: tuple[float, float], apart: bool, main_ways: bool) -> dict[str, Any]:
    """One layer, measured.

    Args:
        case: the layer.
        dtype: of its floating-point arguments.
        rounds: how often each way is timed; 0 only compiles.
        limits: what the machine reaches, as of `machine_limits`.
        apart: whether to time forward and backward as two programs too.
        main_ways: whether to leave out all ways but `MAIN_WAYS`.
    """
    args = case.arguments(dtype)
    ways = {name: fn for name, fn in case.ways().items() if not main_ways or name in MAIN_WAYS}
    beside = case.runners(args) if rounds and not (main_ways or on_accelerator()) else None
    measured = measure(ways, args, rounds=min(case.rounds or rounds, rounds), apart=apart, runners=beside)
    row = as_row(case.name, case.work, measured) | {"dtype": dtype}
    ours = measured["ours"]
    if ours.seconds and limits[0] and dtype == "float32":
        row["share_of_limit"] = max(case.flops / limits[0], (ours.least_bytes or 0) / limits[1]) / ours.seconds
    return row


def as_row(name: str, work: str, measured: dict[str, Measured]) -> dict[str, Any]:
    """What was measured, and the ratios to the first way."""
    first = measured["idiomatic"]
    ways: dict[str, Any] = {}
    for way, m in measured.items():
        pairs = {
            "time": (m.seconds, first.seconds),
            "apart": (m.apart_seconds, first.apart_seconds),
            "temp": (m.temp_bytes, first.temp_bytes),
            "resident": (m.resident_bytes, first.resident_bytes),
        }
        ways[way] = asdict(m) | {f"{key}_ratio": None if value is None or not base else value / base for key, (value, base) in pairs.items()}
    return {"name": name, "work": work, "ways": ways}


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    """What identifies a row of a file: its name and its dtype."""
    return row["name"], row.get("dtype", "float32")


def merged(new: dict[str, Any], old: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`new`, with the rows of `old` that were not run again, in the order of `names`; a row that was only compiled keeps its times.

    The machine is that of `old` as long as a row of it is kept.
    """
    before = {key_of(r): r for r in old["rows"]}
    rows = before | {key_of(r): with_times(r, before.get(key_of(r))) for r in new["rows"]}
    kept = {k for k in before if k[0] in names} - set(map(key_of, new["rows"]))  # their ratios to the machine's limits are to those that stand there
    machine = old["machine"] if old["machine"] and (kept or not new["machine"]["matmul_flops"]) else new["machine"]
    ordered = sorted((k for k in rows if k[0] in names), key=lambda k: (names.index(k[0]), k[1] != "float32"))
    return {"machine": machine, "rows": [rows[k] for k in ordered]}


def with_times(row: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """The row, with what only a run can tell from `before` where it was only compiled."""
    if before is None or row["ways"]["idiomatic"]["seconds"] is not None:
        return row
    ways = {w: m | {k: before["ways"].get(w, {}).get(k) for k in TIMED if k in m} for w, m in row["ways"].items()}
    return before | row | {"ways": ways | {w: m for w, m in before["ways"].items() if m["temp_bytes"] is None}}  # peers are not compiled
