"""What `Function.apply` costs, by each engine, beside a hand-written `jax.custom_vjp` of the same layer: traced, and compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.function.engine import ENGINES, Engine, engine
from layers.function.function import Function

CALLS = 24
SHAPE = (32, 64)


class LinearFunction(Function):
    """`input @ weight.T + bias`, as in PyTorch's documentation."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        return input @ weight.T + bias

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        return grad_output @ weight, grad_output.T @ input, grad_output.sum(0)


@jax.custom_vjp
def linear(input, weight, bias):
    """The same, written against JAX."""
    return input @ weight.T + bias


def _forward(input, weight, bias):
    return input @ weight.T + bias, (input, weight)


def _backward(residuals, grad_output):
    input, weight = residuals
    return grad_output @ weight, grad_output.T @ input, grad_output.sum(0)


linear.defvjp(_forward, _backward)


def bench_function(*, rounds: int = 15) -> dict[str, float]:
    """Times a program of 24 calls written with `Function`, by each engine, and with `jax.custom_vjp`, alternating, in this process.

    Args:
        rounds: how often each is timed.

    Returns:
        Seconds (medians) and ratios, `Function` by the engine of linear operations or by that of `custom_vjp` over the one written by hand:
        `trace_gradient` is `jax.jit(jax.grad(f)).trace`, `trace_forward` is `jax.make_jaxpr(f)`, `run` the compiled gradient.
    """
    programs = {"linear": _under("linear"), "custom_vjp": _under("custom_vjp"), "by_hand": linear}
    args = _arguments()
    compiled = {name: jax.jit(_gradient(layer)).lower(*args).compile() for name, layer in programs.items()}
    kinds: dict[str, Callable[[str], Any]] = {
        "trace_gradient": lambda name: jax.jit(_gradient(programs[name])).trace(*args),
        "trace_forward": lambda name: jax.make_jaxpr(_stack(programs[name]))(*args),
        "run": lambda name: jax.block_until_ready(compiled[name](*args)),
    }
    result: dict[str, float] = {"calls": CALLS}
    for kind, once in kinds.items():
        seconds = _medians(once, list(programs), rounds if kind != "run" else 20 * rounds)
        result |= {f"{kind}_{name}": s for name, s in seconds.items()}
        result |= {f"{kind}_{name}_ratio": seconds[name] / seconds["by_hand"] for name in ENGINES}
    return result


def _under(name: Engine) -> Callable[..., jax.Array]:
    """`LinearFunction.apply` by an engine."""

    def apply(*args: jax.Array) -> jax.Array:
        with engine(name):
            return LinearFunction.apply(*args)

    return apply


def _arguments() -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    keys = jax.random.split(jax.random.key(0), CALLS + 1)
    width = SHAPE[1]
    layers = [(jax.random.normal(k, (width, width)) / width**0.5, jnp.zeros(width)) for k in keys[1:]]
    return jax.random.normal(keys[0], SHAPE), layers


def _stack(layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(x: jax.Array, layers: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        for weight, bias in layers:
            x = layer(x, weight, bias)
        return x.sum()

    return run


def _gradient(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(_stack(layer), argnums=(0, 1))


def _medians(once: Callable[[str], Any], names: list[str], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            once(name)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}
