"""The folder of a run: one run in it, one process at it, and `run.json`, which says how the run was made."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from layers.tools.checkpoints import Checkpoints
from layers.tools.run_error import RunError, reason
from layers.tools.whole_files import write_whole

OF_A_RUN = ("run.json", "checkpoints", "metrics.json", "loss.png")
_PACKAGES = ("vjp-layers", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


@dataclass(frozen=True)
class RunFolder:
    """A folder that is there, can be written to, and is this process's.

    Attributes:
        path: absolute.
        checkpoints: those of the run.
        newest: the step of the newest whole checkpoint; None where there is none.
        how: how the run was made that the folder holds; None for a new one.
        damaged: what is wrong with each checkpoint newer than `newest`.
    """

    path: Path
    checkpoints: Checkpoints
    newest: int | None
    how: dict[str, Any] | None
    damaged: dict[int, str]

    def begin(self, how: dict[str, Any]) -> None:
        """Writes `run.json` and clears away what a kill or damage has left."""
        with _in_words(self.path):
            self.checkpoints.remove_unfinished()
            self.checkpoints.set_aside(self.damaged)
            write_whole(self.path / "run.json", json.dumps(how, indent=1).encode())

    def write(self, name: str, content: bytes) -> None:
        """Writes one of the files of the run."""
        with _in_words(self.path):
            write_whole(self.path / name, content)


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """Opens the folder of a run, or makes it; no other process can open it meanwhile.

    Raises:
        RunError: where the folder holds a run and `resume` is not set, or is not there and it is; where it cannot be made or written; where
            another process is at it; where no checkpoint of the run is whole.
    """
    if resume and not path.exists():
        raise RunError(f"--resume was given, but there is no run in {path}", code=2)
    with _in_words(path):
        path.mkdir(parents=True, exist_ok=True)
        place = os.open(path, os.O_RDONLY)
    try:
        _lock(place, path)
        if not resume and any((path / name).exists() for name in OF_A_RUN):
            raise RunError(f"{path} holds a run already; give --resume to go on with it, or another --out", code=2)
        with _in_words(path):
            (path / "checkpoints").mkdir(exist_ok=True)
        checkpoints = Checkpoints(path / "checkpoints")
        newest, damaged = checkpoints.newest_whole()
        if newest is None and damaged:
            step, damage = next(iter(damaged.items()))
            raise RunError(f"no checkpoint in {checkpoints.folder} is whole (the newest is {step}: {damage}); start again with another --out")
        how = checkpoints.how_made(newest) if newest is not None else _read(path / "run.json")
        yield RunFolder(path, checkpoints, newest, how, damaged)
    finally:
        os.close(place)


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "device": jax.devices()[0].device_kind}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Makes an error of the operating system one line."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or path)
        file = next((p for p in (where, *where.parents) if p.exists()), where)
        what = f"cannot be written: {reason(error)}" if file.is_dir() else "is a file, but must be a folder"
        raise RunError(f"{where if file.is_dir() else file} {what}; give another --out") from error


def _lock(place: int, path: Path) -> None:
    """Holds the folder until the process ends, where the file system can do that."""
    try:
        import fcntl

        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another process trains in {path}; wait for it, or give another --out", code=2) from None
    except (ImportError, OSError):
        return


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not what was written ({reason(error)}), and there is no checkpoint; start again with another --out") from error
