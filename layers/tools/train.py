"""The training loop: one jitted step, drawn by (seed, step) alone, so that a run that was killed goes on bit for bit."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from layers.tools.blame import all_finite, first_not_finite
from layers.tools.console import lasting
from layers.tools.run_error import RunError
from layers.tools.run_folder import RunFolder, open_run, versions
from layers.tools.settings import Options, Settings, settle
from layers.tools.signals import Interrupted, StopSignals
from layers.tools.tasks import Task


def train(options: Options) -> dict[str, float]:
    """Trains, and writes `run.json`, `checkpoints/`, `metrics.json` and `loss.png` to the run's folder.

    A signal to stop ends the step and writes a checkpoint. A step whose loss, gradients or update are not finite does not change the state, which
    is written, and ends the run.

    Returns:
        The validation metrics at the end.

    Raises:
        RunError: where the folder holds another run and `resume` is not set; where `resume` is set and there is no run, none of its checkpoints is
            whole or the options are not the run's; where the folder cannot be written; where something is not finite. One that was killed
            before its first checkpoint starts again.
        Interrupted: after a signal.
    """
    with StopSignals() as signals, open_run((options.out or Path("runs") / options.task).absolute(), resume=options.resume) as folder:
        settings, task = settle(options, folder.how, folder.path)
        if (folder.newest or 0) > settings.steps:
            raise RunError(f"the run in {folder.path} is at step {folder.newest} already, past --steps {settings.steps}", code=2)
        run = _Run(settings, task, folder, signals)
        metrics = run.train()
        _report(folder, settings, run.losses, metrics)
        run.stop_if_asked("the run was complete")
        return metrics


class _Run:
    """The state of a run in memory: parameters and moments, the losses so far, and the step that they stand at."""

    def __init__(self, settings: Settings, task: Task, folder: RunFolder, signals: StopSignals):
        self.settings, self.task, self.folder, self.signals = settings, task, folder, signals
        self.how = settings.how_made(versions(), task.data)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate))
        self.state: Any = jax.jit(self._start)()
        self.losses: list[float] = []
        self.saved: int | None = None
        if folder.newest is not None:
            like = {"state": self.state, "losses": np.zeros(folder.newest, np.float32)}
            restored = folder.checkpoints.restore(folder.newest, like)
            self.state, self.losses, self.saved = restored["state"], restored["losses"].tolist(), folder.newest
        self._say_what_differs()
        folder.begin(self.how)

    @property
    def done(self) -> int:
        """Steps behind us."""
        return len(self.losses)

    def train(self) -> dict[str, float]:
        """Runs the steps that are left, and validates."""
        settings, task = self.settings, self.task
        step = jax.jit(self._step, donate_argnums=0)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=lasting(sys.stderr))) as progress:
            bar = progress.add_task(settings.task, total=settings.steps, completed=self.done)
            while self.done < settings.steps and self.signals.received is None:
                self._advance(step)
                rate = (progress.tasks[0].speed or 0) * settings.batch_size * task.per_example
                progress.update(bar, advance=1, description=f"{settings.task}  loss {self.losses[-1]:.4f}  {rate:,.0f} {task.unit}/s")
                if self.done % settings.checkpoint_every == 0:
                    self.save()
            self.save()
        self.stop_if_asked(f"stopped after step {self.done}; --resume goes on")
        measured = jax.jit(lambda params, rest: task.validate(nnx.merge(self.graph, params, rest)))(self.state["params"], self.state["rest"])
        metrics = {name: float(value) for name, value in measured.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise RunError(f"the held-out {name} is {value}, though no step was; checkpoint {self.done} is kept in {self.folder.path}")
        return metrics

    def save(self) -> None:
        """Writes a checkpoint, unless there is one of this step."""
        if self.saved != self.done:
            losses = np.asarray(self.losses, np.float32)
            self.folder.checkpoints.save(self.done, {"state": self.state, "losses": losses}, self.how)
            self.saved = self.done

    def stop_if_asked(self, message: str) -> None:
        """Raises where a signal has come."""
        if (number := self.signals.received) is not None:
            raise Interrupted(number, f"train: {signal.Signals(number).name}: {message}")

    def _start(self) -> dict[str, Any]:
        self.graph, params, rest = nnx.split(self.task.model(nnx.Rngs(self.settings.seed)), nnx.Param, ...)
        return {"params": params, "rest": rest, "optimizer": self.optimizer.init(params)}

    def _advance(self, step: Any) -> None:
        try:
            self.state, loss, good = step(self.state, jnp.asarray(self.done))
            good = bool(good)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise RunError(
                f"step {self.done + 1} does not fit into the memory of the device; give a smaller --batch-size than {self.settings.batch_size}"
            ) from error
        if not good:
            self._refuse()
        self.losses.append(float(loss))

    def _batch(self, number: Any) -> Any:
        return self.task.draw(jax.random.fold_in(jax.random.key(self.settings.seed), number), self.settings.batch_size)

    def _step(self, state: dict[str, Any], number: jax.Array) -> tuple[dict[str, Any], jax.Array, jax.Array]:
        """The state after a step, or the one before where something in it is not finite."""
        batch = self._batch(number)
        loss, grads = jax.value_and_grad(lambda p: self.task.loss(nnx.merge(self.graph, p, state["rest"]), batch))(state["params"])
        updates, moments = self.optimizer.update(grads, state["optimizer"], state["params"])
        new = state | {"params": optax.apply_updates(state["params"], updates), "optimizer": moments}
        good = all_finite(loss, grads, new["params"], new["optimizer"])
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state), loss, good

    def _refuse(self) -> None:
        """Keeps the state before a step in which something is not finite, and says what that is."""
        self.save()
        batch = self._batch(jnp.asarray(self.done))
        found = first_not_finite(self.graph, self.state["params"], self.state["rest"], lambda model: self.task.loss(model, batch))
        found = found or f"the update (the learning rate is {self.settings.learning_rate:g})"
        raise RunError(f"step {self.done + 1} is not finite, first in {found}; the state before it is kept as checkpoint {self.done}")

    def _say_what_differs(self) -> None:
        """Says which checkpoints are passed over, and what may keep this run from going on bit for bit."""
        folder, before = self.folder, (self.folder.how or {}).get("versions", {})
        lines = [f"checkpoint {step} is damaged ({wrong}); going on from {folder.newest}" for step, wrong in folder.damaged.items()]
        others = [f"{name} {before[name]} is {now} now" for name, now in self.how["versions"].items() if before.get(name, now) != now]
        if others:
            lines.append(f"{', '.join(others)}: the run goes on, but maybe not to the bit")
        lasting(sys.stderr).write("".join(f"train: {line}\n" for line in lines))


def _report(folder: RunFolder, settings: Settings, losses: list[float], metrics: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.write("metrics.json", json.dumps({"validation": metrics, "losses": losses}).encode())
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(losses)
    ax.set(xlabel="step", ylabel="loss", title=settings.task)
    picture = io.BytesIO()
    figure.savefig(picture)
    plt.close(figure)
    folder.write("loss.png", picture.getvalue())
    console = Console(file=lasting(sys.stdout))
    for name, value in metrics.items():
        console.print(f"held-out {name}: {value:.4f}")
    console.print(f"checkpoints, metrics.json and loss.png are in {folder.path}")
