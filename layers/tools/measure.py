"""Times and memory of programs that do the same work, side by side in one process.

Times are medians of rounds in which every program runs once, in turn: what disturbs the machine disturbs all of them. Memory is what XLA
plans for temporaries, exact and the same in every run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Measured:
    """One program.

    Attributes:
        seconds: the median of its runs; None where it was only compiled.
        spread: half the distance between the quartiles, as a share of the median.
        temp_bytes: the temporary memory of the compiled program.
    """

    seconds: float | None
    spread: float | None
    temp_bytes: int


def compile_program(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return jax.jit(fn).lower(*args).compile()


def measure(programs: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], *, rounds: int) -> dict[str, Measured]:
    """Compiles each program and runs all of them in turn `rounds` times; `rounds=0` only compiles.

    Args:
        programs: by name.
        args: the arguments of all of them.
        rounds: how often each is run, after one run that does not count.
    """
    compiled = {name: compile_program(fn, args) for name, fn in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(rounds + 1 if rounds else 0):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: _summary(times[name], program.memory_analysis().temp_size_in_bytes) for name, program in compiled.items()}


def _summary(seconds: list[float], temp_bytes: int) -> Measured:
    if not seconds:
        return Measured(None, None, temp_bytes)
    middle = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (middle, middle, middle)
    return Measured(middle, (high - low) / 2 / middle, temp_bytes)


def machine_limits() -> tuple[float, float]:
    """The matmul rate in floating-point operations a second and the copy bandwidth in bytes a second that this machine reaches."""
    n, size = 2048, 1 << 26
    square, line = jnp.ones((n, n)), jnp.ones((size,))
    seconds = measure({"matmul": lambda a, _: a @ a, "copy": lambda _, b: b * 2}, (square, line), rounds=5)
    matmul, copy = seconds["matmul"].seconds, seconds["copy"].seconds
    assert matmul is not None and copy is not None
    return 2 * n**3 / matmul, 2 * 4 * size / copy
