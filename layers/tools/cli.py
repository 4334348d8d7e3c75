"""`python -m layers train` and `python -m layers bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path


def _number(kind: type, least: float, strict: bool) -> object:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not math.isfinite(value) or value < least or (strict and value == least):
            raise argparse.ArgumentTypeError(f"{text} was given, but it must be {'above' if strict else 'at least'} {least:g}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m layers", description="Layers whose gradient is written by hand.")
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model built of these layers on data that is on this machine")
    train.add_argument("--task", choices=("digits", "text"), required=True, help="handwritten digits, or the source of Python's standard library")
    train.add_argument("--layers", choices=("ours", "flax"), default="ours", help="whose layers the model is built of")
    train.add_argument("--steps", type=_number(int, 1, False), help="training steps in all")  # type: ignore[arg-type]
    train.add_argument("--batch-size", type=_number(int, 1, False), help="examples or sequences in a step")  # type: ignore[arg-type]
    train.add_argument("--learning-rate", type=_number(float, 0, True), default=3e-3)  # type: ignore[arg-type]
    train.add_argument("--seed", type=_number(int, 0, False), default=0)  # type: ignore[arg-type]
    train.add_argument("--checkpoint-every", type=_number(int, 1, False), default=100, metavar="STEPS")  # type: ignore[arg-type]
    train.add_argument("--out", type=Path, help="folder for checkpoints, metrics and plot; runs/TASK by default")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    bench = commands.add_parser("bench", help="measure on this machine")
    bench.add_argument("name", nargs="*", help="rows to run: function, or the name of a layer; all by default")
    bench.add_argument("--rounds", type=_number(int, 0, False), default=5, help="timed runs of each; 0 compiles only")  # type: ignore[arg-type]
    bench.add_argument("--json", help="file for the results; rows of other runs that it holds are kept")
    bench.add_argument("--plot", help="picture of the ratios")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "bench":
        from layers.tools import bench

        try:
            return bench.main(options.name, rounds=options.rounds, json_path=options.json, plot_path=options.plot)
        except ValueError as error:
            parser().error(str(error))
    from layers.tools.train import Options, train

    given = {k: v for k, v in vars(options).items() if k != "command" and v is not None}
    try:
        train(Options(**given))
    except FileExistsError as error:
        parser().error(str(error))
    except FileNotFoundError as error:
        parser().error(str(error))
    return 0
