"""The training step of `llama_step` on the device that is here: each way by itself, since a state and its temporaries may fill the memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.machine import platform
from layers.tools import llama_step
from layers.tools.measure import Measured, compile_program, in_turn, of_program, summary

NAME = "training_step_gpu"
KERNELS = {"cuda": "cudnn", "tpu": "mosaic"}
"""By which kernel attention is computed in the last way, where the device has one."""
BY_KERNEL = "ours, attention by a kernel"


def work(sizes: dict[str, int] | None = None) -> str:
    """What is computed, with sizes."""
    size = "{depth} layers, width {width}, vocab {vocab}, batch {batch} x {time}".format(**(sizes or llama_step.SIZES))
    return f"training step of a Llama-like model: {size}"


def row(rounds: int, sizes: dict[str, int] | None = None) -> tuple[str, str, dict[str, Measured]]:
    """Name, work and what was measured of each way."""
    ways: dict[str, tuple[str, str | None]] = {way: (way, None) for way in llama_step.WAYS}
    if platform() in KERNELS:
        ways[BY_KERNEL] = "ours", KERNELS[platform()]
    return NAME, work(sizes), {name: _measure(*way, rounds, sizes) for name, way in ways.items()}


def _measure(way: str, implementation: str | None, rounds: int, sizes: dict[str, int] | None) -> Measured:
    step, shapes = llama_step.make_step(way, sizes, implementation)
    compiled = compile_program(step, shapes, donate_argnums=(0, 1))
    known = of_program(compiled)
    if not rounds:
        return known
    times = in_turn({way: _repeated(compiled, *draw(shapes))}, rounds)[way]
    gc.collect()  # the state of this way, before that of the next
    return summary(times, known)


def _repeated(compiled: Callable[..., Any], params: Any, moments: Any, tokens: jax.Array) -> Callable[[], Any]:
    """One step more at each call."""
    state = [params, moments]

    def run() -> jax.Array:
        *state[:], loss = compiled(*state, tokens)
        return loss

    return run


def draw(shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parameters and tokens at random, moments of zeros; a parameter depends on its shape alone, whatever the module that holds it is called."""
    params, moments, tokens = shapes
    vocab = max(x.shape[0] for x in jax.tree.leaves(params))
    drawn = jax.tree.map(lambda x: x.shape[-1] ** -0.5 * jax.random.normal(jax.random.key(sum(x.shape)), x.shape, x.dtype), params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), moments)
    return drawn, zeros, jax.random.randint(jax.random.key(1), tokens.shape, 0, vocab)
