"""The training loop: one jitted step, drawn by (seed, step) alone, so that a run that was killed goes on bit for bit."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from layers.tools.language_model import MODULES
from layers.tools.tasks import TASKS, Task


@dataclass(frozen=True)
class Options:
    """What the command line sets; `None` is the task's default."""

    task: str
    layers: str = "ours"
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 3e-3
    seed: int = 0
    checkpoint_every: int = 100
    out: Path | None = None
    resume: bool = False


def train(options: Options) -> dict[str, float]:
    """Trains, and writes `checkpoints/`, `metrics.json` and `loss.png` to the run's folder.

    Returns:
        The validation metrics at the end.

    Raises:
        FileExistsError: where the folder holds another run and `resume` is not set.
        FileNotFoundError: where `resume` is set and there is no run. One that was killed before its first checkpoint starts again.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    task = TASKS[options.task](MODULES[options.layers])
    steps, batch_size = options.steps or task.steps, options.batch_size or task.batch_size
    folder = (options.out or Path("runs") / options.task).resolve()
    if options.resume and not folder.exists():
        raise FileNotFoundError(f"train: --resume was given, but there is no run in {folder}")
    with ocp.CheckpointManager(folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        last = manager.latest_step()
        if not options.resume and last is not None:
            raise FileExistsError(f"train: {folder} holds a run already; give --resume to go on with it, or another --out")
        graph, state = _start(task, options.seed, options.learning_rate)
        losses = np.full(steps, np.nan, np.float32)
        if last is not None:
            like = {"state": state, "losses": np.zeros(last, np.float32)}
            restored = manager.restore(last, args=ocp.args.StandardRestore(like))  # type: ignore[call-arg]
            state, done = restored["state"], min(last, steps)
            losses[:done] = restored["losses"][:done]
        state = _run(task, graph, state, losses, (last or 0), steps, batch_size, options, manager)
        manager.wait_until_finished()
    metrics = task.validate(nnx.merge(graph, state["params"], state["rest"]))
    _report(folder, options, losses, metrics)
    return metrics


def _optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def _start(task: Task, seed: int, learning_rate: float) -> tuple[Any, dict[str, Any]]:
    graph, params, rest = nnx.split(task.model(nnx.Rngs(seed)), nnx.Param, ...)
    return graph, {"params": params, "rest": rest, "optimizer": _optimizer(learning_rate).init(params)}


def _make_step(task: Task, graph: Any, options: Options, batch_size: int) -> Any:
    optimizer = _optimizer(options.learning_rate)

    def step(state: dict[str, Any], number: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        batch = task.draw(jax.random.fold_in(jax.random.key(options.seed), number), batch_size)
        loss, grads = jax.value_and_grad(lambda p: task.loss(nnx.merge(graph, p, state["rest"]), batch))(state["params"])
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        return state | {"params": optax.apply_updates(state["params"], updates), "optimizer": moments}, loss

    return jax.jit(step, donate_argnums=0)


def _run(
    task: Task, graph: Any, state: Any, losses: np.ndarray, first: int, steps: int, batch_size: int, options: Options, manager: ocp.CheckpointManager
) -> Any:
    step = _make_step(task, graph, options, batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(options.task, total=steps, completed=min(first, steps))
        for number in range(first, steps):
            state, loss = step(state, jnp.asarray(number))
            losses[number] = loss
            rate = (progress.tasks[0].speed or 0) * batch_size * task.per_example
            progress.update(bar, advance=1, description=f"{options.task}  loss {losses[number]:.4f}  {rate:,.0f} {task.unit}/s")
            if (number + 1) % options.checkpoint_every == 0 or number + 1 == steps:
                manager.save(number + 1, args=ocp.args.StandardSave({"state": state, "losses": losses[: number + 1].copy()}))  # type: ignore[call-arg]
                manager.wait_until_finished()
    return state


def _report(folder: Path, options: Options, losses: np.ndarray, metrics: dict[str, float]) -> None:
    (folder / "metrics.json").write_text(json.dumps({"validation": metrics, "losses": losses.tolist()}))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(losses)
    ax.set(xlabel="step", ylabel="loss", title=options.task)
    figure.savefig(folder / "loss.png")
    plt.close(figure)
    console = Console()
    for name, value in metrics.items():
        console.print(f"held-out {name}: {value:.4f}")
    console.print(f"checkpoints, metrics.json and loss.png are in {folder}")
