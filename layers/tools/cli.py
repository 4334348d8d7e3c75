"""`python -m layers train` and `python -m layers bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

_INT32, _UINT32, _FLOAT32 = 2**31 - 1, 2**32 - 1, (2 - 2**-23) * 2.0**127

TASKS = {
    "digits": "handwritten digits",
    "text": "the source of Python's standard library",
    "text-fp8": "the same, linear layers in 8 bits",
    "text-moe": "the same, with experts",
    "grpo": "digits to be written backwards, by reinforcement learning",
}


def _number(kind: type, least: float, *, most: float = _FLOAT32, strict: bool = False) -> Any:
    """Reads a number from `least`, or from above it where `strict`, to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not (least < value if strict else least <= value):
            raise argparse.ArgumentTypeError(f"{text} was given, but it must be {'above' if strict else 'at least'} {least:g}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} was given, but it must be at most {most:.10g}")
        return value

    return parse


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m layers", description="Layers whose gradient is written by hand.")
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model built of these layers on data that is on this machine")
    train.add_argument("--task", choices=TASKS, required=True, help="; ".join(f"{name}: {what}" for name, what in TASKS.items()))
    train.add_argument("--layers", choices=("ours", "flax"), help="whose layers the model is built of; ours by default")
    train.add_argument("--steps", type=_number(int, 1, most=_INT32), help="training steps in all")
    train.add_argument("--batch-size", type=_number(int, 1, most=_INT32), help="examples or sequences in a step")
    train.add_argument("--learning-rate", type=_number(float, 0, strict=True), help="0.003 by default")
    train.add_argument("--seed", type=_number(int, 0, most=_UINT32), help="0 by default")
    train.add_argument("--checkpoint-every", type=_number(int, 1), metavar="STEPS", help="100 by default")
    train.add_argument("--out", type=_folder, help="folder for checkpoints, metrics and plot; runs/TASK by default")
    train.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in the folder, with the options of that run")
    verify = commands.add_parser("verify", help="find out which kernels are right and fast on this machine, and that all layers are right")
    verify.add_argument("name", nargs="*", help="layers to run, as their files are called, such as rms_norm; all by default")
    verify.add_argument("--minutes", type=_number(float, 0, strict=True), default=5, help="after which nothing more is begun; 5 by default")
    verify.add_argument("--json", type=Path, help="file of the table; that which layers choose by, by default")
    bench = commands.add_parser("bench", help="measure on this machine")
    bench.add_argument("name", nargs="*", help="rows to run: function, or the name of a layer; all by default")
    bench.add_argument("--rounds", type=_number(int, 0), help="timed runs of each, 5 by default; 0 compiles only")
    bench.add_argument("--size", choices=("cpu", "gpu"), help="which rows, where none is named: small ones, or those that people train on one GPU")
    bench.add_argument("--quick", action="store_true", help="few rows and rounds, in 4 minutes; on an accelerator in bfloat16")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the arguments of layers; that of each row by default")
    bench.add_argument("--apart", action="store_true", help="time forward and backward also as two programs, as where a model is between them")
    bench.add_argument("--compile-for", choices=("h100", "v5p"), help="only compile, for a device that is not here: its memory in bfloat16")
    bench.add_argument("--json", help="file for the results; rows of other runs that it holds are kept")
    bench.add_argument("--plot", help="picture of the ratios")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "verify":
        from layers.tools import verify

        try:
            return verify.main(options.name, minutes=options.minutes, path=options.json)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            parser().error(str(error))
    if options.command == "bench":
        try:
            if options.compile_for is not None:
                jax.config.update("jax_platforms", "cpu")  # before any array is made: the plugins are only compilers here
                from layers.tools import bench_devices

                return bench_devices.main(options.name, options.compile_for, json_path=options.json)
            return _bench(options)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            parser().error(str(error))
    return _train({k: v for k, v in vars(options).items() if k != "command" and v is not None})


def _bench(options: argparse.Namespace) -> int:
    """Runs `bench` on this machine.

    Raises:
        ValueError: for names beside an option that picks rows.
    """
    from layers.tools import bench

    for option, given in (("--size", options.size), ("--quick", options.quick)):
        if given and options.name:
            raise ValueError(f"bench: {option} picks the rows, but {' '.join(options.name)} is named: give one of them")
    if options.quick and options.size:
        raise ValueError("bench: --quick and --size both pick the rows: give one of them")
    plan = bench.quick() if options.quick else bench.Plan()
    given = {"rounds": options.rounds, "dtype": options.dtype, "apart": options.apart or None}
    plan = replace(plan, **{k: v for k, v in given.items() if v is not None})
    chosen = options.name or (bench.QUICK if options.quick else [])
    return bench.main(chosen, plan, size=options.size or "cpu", json_path=options.json, plot_path=options.plot)


def _train(given: dict[str, Any]) -> int:
    """Runs `train`; whatever ends it is one line and an exit code."""
    from layers.tools.console import lasting
    from layers.tools.run_error import RunError, reason
    from layers.tools.signals import Interrupted, StopSignals

    with StopSignals():
        try:
            from layers.tools.settings import Options
            from layers.tools.train import train

            train(Options(**given))
            return 0
        except (Interrupted, RunError) as error:
            message, code = str(error), error.code
        except ModuleNotFoundError as error:
            message, code = f"train: {error.name} is not installed: python3 -m pip install 'vjp-layers[train]'", 1
        except (OSError, MemoryError) as error:
            message, code = f"train: {getattr(error, 'filename', None) or 'memory'}: {reason(error)}", 1
        lasting(sys.stderr).write(message + "\n")
        return code
