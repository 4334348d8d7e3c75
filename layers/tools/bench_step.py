"""A whole training step of a language model: Flax's layers, the same under `jax.checkpoint`, the same swapped, and a model built of ours.

    python -m layers.tools.bench_step WAY STACK

runs two steps of one way in a fresh process and prints the bytes of its peak resident memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import layers
from layers.tools.language_model import Block, Decoder, fused_loss, plain_loss
from layers.tools.measure import Measured, compile_program, in_turn, of_program, summary

SIZES: dict[str, int] = {"vocab": 32000, "length": 512, "width": 256, "depth": 4, "heads": 4}
BATCH = 8
STACKS = ("unrolled", "scanned")

Loss = Callable[[Decoder, jax.Array], jax.Array]


class CheckpointedBlock(nnx.Module):
    """A block under `jax.checkpoint`."""

    def __init__(self, block: Block, policy: Any):
        self.block, self.policy = block, policy

    def __call__(self, x: jax.Array) -> jax.Array:
        graph, state = nnx.split(self.block)
        return jax.checkpoint(lambda s, x: nnx.merge(graph, s)(x), policy=self.policy)(state, x)


def _plain(scan: bool, sizes: dict[str, int]) -> tuple[Decoder, Loss]:
    return Decoder(nnx, nnx.Rngs(0), scan=scan, **sizes), plain_loss  # type: ignore[arg-type]


def _checkpointed(policy: Any, scan: bool, sizes: dict[str, int]) -> tuple[Decoder, Loss]:
    model, loss = _plain(scan, sizes)
    model.blocks = CheckpointedBlock(model.blocks, policy) if scan else nnx.List([CheckpointedBlock(b, policy) for b in model.blocks])
    return model, loss


def _swapped(scan: bool, sizes: dict[str, int]) -> tuple[Decoder, Loss]:
    return layers.swap(_plain(scan, sizes)[0]).model, fused_loss


def _ours(scan: bool, sizes: dict[str, int]) -> tuple[Decoder, Loss]:
    return Decoder(layers, nnx.Rngs(0), scan=scan, **sizes), fused_loss  # type: ignore[arg-type]


WAYS: dict[str, Callable[[bool, dict[str, int]], tuple[Decoder, Loss]]] = {
    "idiomatic": _plain,
    "checkpoint": partial(_checkpointed, None),
    "dots policy": partial(_checkpointed, jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "swapped": _swapped,
    "ours": _ours,
}


def make_step(way: str, *, scan: bool, sizes: dict[str, int] | None = None) -> tuple[Callable[..., Any], Any]:
    """The step `(state, tokens) -> (state, loss)` with Adam, and the state it starts from."""
    model, loss = WAYS[way](scan, sizes or SIZES)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-3)

    def step(state: Any, tokens: jax.Array) -> Any:
        params, moments = state
        value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p, rest), tokens))(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step, (params, optimizer.init(params))


def draw_tokens(sizes: dict[str, int] | None = None, *, batch: int = BATCH) -> jax.Array:
    sizes = sizes or SIZES
    return jax.random.randint(jax.random.key(1), (batch, sizes["length"] + 1), 0, sizes["vocab"])


def rows(*, rounds: int, stacks: tuple[str, ...] = STACKS) -> list[tuple[str, str, dict[str, Measured]]]:
    """Name, work and what was measured, for each form of the stack."""
    size = "{depth} layers, width {width}, vocab {vocab}, batch {batch} x {length}".format(batch=BATCH, **SIZES)
    return [(f"training_step_{s}", f"training step, {s} stack: {size}", _measure(s, rounds)) for s in stacks]


def _measure(stack: str, rounds: int) -> dict[str, Measured]:
    tokens = draw_tokens()
    states: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    known: dict[str, Measured] = {}
    for way in WAYS:
        step, states[way] = make_step(way, scan=stack == "scanned")
        compiled = compile_program(step, (states[way], tokens), donate_argnums=0)
        known[way] = of_program(compiled)

        def run(way: str = way, compiled: Any = compiled) -> None:
            states[way], loss = compiled(states[way], tokens)
            jax.block_until_ready(loss)

        runs[way] = run
    times = in_turn(runs, rounds)
    return {way: summary(times[way], replace(known[way], resident_bytes=peak_resident(way, stack) if rounds else None)) for way in WAYS}


def peak_resident(way: str, stack: str) -> int | None:
    """Bytes of resident memory that a fresh process reaches in two steps; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    done = subprocess.run([sys.executable, "-m", "layers.tools.bench_step", way, stack], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _run_alone(way: str, stack: str) -> None:
    step, state = make_step(way, scan=stack == "scanned")
    tokens = draw_tokens()
    compiled = jax.jit(step, donate_argnums=0)
    for _ in range(2):
        state, loss = compiled(state, tokens)
        jax.block_until_ready(loss)
    assert jnp.isfinite(loss)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


if __name__ == "__main__":
    _run_alone(*sys.argv[1:])
