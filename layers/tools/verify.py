"""`python -m layers verify`: which kernels are right and fast on this machine, and whether every layer is right on it.

Each kernel is compared with float64 on the CPU and with XLA, in error and in time, call by call; what it is found to be goes into the table that
layers choose by, at once. Then every layer of the library is compared with float64 on the CPU, in float32 and in bfloat16.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console

from layers.checking.contract import catalogue
from layers.kernels import verified
from layers.kernels.place import here
from layers.tools import verify_attention, verify_layers, verify_losses, verify_scans


def names() -> list[str]:
    """What `verify` takes: the layers, as their files are called."""
    return list(dict.fromkeys(verify_layers.name_of(layer) for layer in catalogue()))


def main(chosen: Sequence[str], *, minutes: float = 5, path: Path | None = None) -> int:
    """Verifies the named layers, or all, and prints each result as it is there.

    Returns:
        The number of layers and kernels that failed, at most 1: an exit code.

    Raises:
        ValueError: for a name that is no layer.
        OSError: where the table cannot be written.
    """
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        raise ValueError(f"verify: no layer is named {unknown[0]!r}; there are {', '.join(names())}")
    path = path or verified.TABLE
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise OSError(f"verify: {path} cannot be written: give another file by --json")
    console, end, failed = Console(soft_wrap=True), time.monotonic() + 60 * minutes, 0
    console.print(f"{here()}, {jax.devices()[0].device_kind}")
    for title, run in _jobs(chosen or names(), path):
        if time.monotonic() > end:
            console.print(f"{title}: not begun, {minutes:g} minutes are over", markup=False)
            continue
        said, well = run()
        failed += not well
        console.print(f"{title}: {said}", markup=False)
    return min(failed, 1)


def _jobs(chosen: Sequence[str], path: Path) -> Iterator[tuple[str, Callable[[], tuple[str, bool]]]]:
    """What there is to do, in turn: a title, and what returns words and whether it went well."""
    for trial in (*verify_attention.trials(), *verify_losses.trials(), *verify_scans.trials()):
        if trial.layer in chosen:
            yield trial.title, lambda trial=trial: _written(trial.row(), path)
    for layer in catalogue():
        if verify_layers.name_of(layer) in chosen:
            yield layer.__name__, lambda layer=layer: verify_layers.verdict(layer)


def _written(row: dict, path: Path) -> tuple[str, bool]:
    verified.write([row], path)
    figures = "" if row["milliseconds"] is None else f"{row['milliseconds']:.3g} ms, XLA {row['xla_milliseconds']:.3g}"
    errors = "" if row["error"] is None else f"; error {row['error']:.2e}, XLA {row['xla_error']:.2e}"
    return f"{row['against'] or 'is taken'} ({figures}{errors})", not row["against"].startswith("failed")
