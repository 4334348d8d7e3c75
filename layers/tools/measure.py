"""Times and memory of programs that do the same work, side by side in one process.

Times are medians of rounds in which every program runs once, in turn: what disturbs the machine disturbs all of them. Memory is what XLA
plans for temporaries, exact and the same in every run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from layers.tools.cases.case import forward, forward_and_backward

SHORTEST, MOST_REPEATS = 0.02, 100
"""Seconds that are timed at least, and how often a program is run for them at most."""


@dataclass(frozen=True)
class Measured:
    """One program.

    Attributes:
        seconds: the median of its runs; None where it was only compiled.
        spread: half the distance between the quartiles, as a share of the median.
        temp_bytes: the temporary memory of the compiled program; None for what XLA did not compile.
        apart_seconds: the median where forward and backward are two programs; None where that was not timed.
        least_bytes: what it reads and writes at least, its arguments and results.
        resident_bytes: the peak resident memory of a fresh process that runs it; None where that was not measured.
    """

    seconds: float | None = None
    spread: float | None = None
    temp_bytes: int | None = None
    apart_seconds: float | None = None
    least_bytes: int | None = None
    resident_bytes: int | None = None


def compile_program(fn: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Any:
    """The compiled program; `options` are those of `jax.jit`."""
    return jax.jit(fn, **options).lower(*args).compile()


def of_program(compiled: Any) -> Measured:
    """What is known without running it."""
    memory = compiled.memory_analysis()
    return Measured(temp_bytes=memory.temp_size_in_bytes, least_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes)


def measure(
    ways: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    *,
    rounds: int,
    apart: bool = False,
    runners: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Measured]:
    """Compiles forward and backward of each function and runs all of them in turn `rounds` times; `rounds=0` only compiles.

    Args:
        ways: functions, by name.
        args: the cotangent of their output, and their arguments.
        rounds: how often each is timed.
        apart: whether forward and backward are timed as two programs too.
        runners: further things to time, not compiled here: functions that return when they are done, or JAX arrays.
    """
    compiled = {name: compile_program(forward_and_backward(fn), args) for name, fn in ways.items()}
    runs = {name: lambda p=p: p(*args) for name, p in compiled.items()} | dict(runners or {})
    times = in_turn(runs, rounds)
    known = {name: of_program(p) for name, p in compiled.items()}
    found = {name: summary(times[name], known.get(name, Measured())) for name in runs}
    if apart and rounds:
        times = in_turn({name: _two_programs(fn, args) for name, fn in ways.items()}, rounds)
        found |= {name: replace(found[name], apart_seconds=statistics.median(seconds)) for name, seconds in times.items()}
    return found


def _two_programs(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    """Runs forward, then backward, which is given what forward kept."""
    cotangent, *rest = args
    ahead, back = jax.jit(forward(fn)), jax.jit(lambda pull, cotangent: pull(cotangent))

    def run() -> Any:
        out, pull = ahead(*rest)
        return out, back(pull, cotangent)

    return run


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of `rounds` runs of each, taken in turn, after one that does not count.

    Every other turn goes backwards: what a program leaves behind in caches and freed memory falls on the one after it. One that is over sooner
    than it could be timed is run several times in a row.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if not rounds:
        return times
    repeats = {name: _repeats(run) for name, run in runs.items()}
    for turn in range(rounds):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            times[name].append(_seconds(run, repeats[name]))
    return times


def _seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """Of one of so many runs in a row."""
    start, out = time.perf_counter(), None
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def _repeats(run: Callable[[], Any]) -> int:
    """How many runs take `SHORTEST` seconds, after one that does not count."""
    _seconds(run)
    return max(1, min(MOST_REPEATS, round(SHORTEST / _seconds(run))))


def summary(seconds: list[float], known: Measured) -> Measured:
    """`known` with the median and the spread of the times."""
    if not seconds:
        return known
    middle = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (middle, middle, middle)
    return replace(known, seconds=middle, spread=(high - low) / 2 / middle)


def machine_limits() -> tuple[float, float]:
    """The matmul rate in floating-point operations a second and the copy bandwidth in bytes a second that this machine reaches."""
    n, size = 2048, 1 << 26
    square, line = jnp.ones((n, n)), jnp.ones((size,))
    compiled = {"matmul": compile_program(lambda a, _: a @ a, (square, line)), "copy": compile_program(lambda _, b: b * 2, (square, line))}
    times = in_turn({name: lambda p=p: p(square, line) for name, p in compiled.items()}, 5)
    matmul, copy = (statistics.median(times[name]) for name in ("matmul", "copy"))
    return 2 * n**3 / matmul, 2 * 4 * size / copy
