"""The options of a run, as given and as settled: those of the run that is gone on with, else the defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layers.tools.language_model import MODULES
from layers.tools.run_error import RunError
from layers.tools.tasks import TASKS, Task

DEFAULTS = {"layers": "ours", "learning_rate": 3e-3, "seed": 0, "checkpoint_every": 100}
FIXED = ("task", "layers", "batch_size", "learning_rate", "seed")
"""What is trained hangs on these: a run keeps them to its end."""


@dataclass(frozen=True)
class Options:
    """What the command line sets; `None` is the run's own where one is gone on with, else the default."""

    task: str
    layers: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    checkpoint_every: int | None = None
    out: Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class Settings:
    """The options of a run, all of them settled."""

    task: str
    layers: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    checkpoint_every: int

    def how_made(self, versions: dict[str, str], data: str) -> dict[str, Any]:
        """What `run.json` says."""
        return {"options": asdict(self), "versions": versions, "data": data}


def settle(options: Options, how: dict[str, Any] | None, where: Path) -> tuple[Settings, Task]:
    """The settings of a run and its task.

    Args:
        options: as given.
        how: what `run.json` says of the run to go on with; None for a new one.
        where: the folder, for messages.

    Raises:
        RunError: where an option that was given would change what the run trains, or the data is not what it was.
    """
    of_run = (how or {}).get("options", {})
    given = {name: value for name, value in asdict(options).items() if name in Settings.__annotations__ and value is not None}
    for name in FIXED:
        if name in given and name in of_run and given[name] != of_run[name]:
            flag = f"--{name.replace('_', '-')}"
            cure = f"give {flag} {of_run[name]}" if name == "task" else "leave it out"
            raise RunError(
                f"{flag} {given[name]} was given, but the run in {where} was made with {of_run[name]}: {cure} to go on, or another --out", code=2
            )
    chosen = {**DEFAULTS, **of_run, **given}
    task = TASKS[chosen["task"]](MODULES[chosen["layers"]])
    if how is not None and how.get("data", task.data) != task.data:
        raise RunError(f"the data of --task {options.task} on this machine is not what the run in {where} was made with; give another --out", code=2)
    return Settings(**{"steps": task.steps, "batch_size": task.batch_size, **chosen}), task
