"""What the activations ask of their arguments, and the rules that they share: only a value and a derivative differ."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.core.elementwise import Activation, elementwise
from layers.core.recompute import barrier
from layers.function.function import Function


class UnaryFunction(Function):
    """y = f(x), dx = dy f'(x): saves x, and computes the rest again from it, behind a barrier, so that XLA does not keep it from the forward pass."""

    activation: ClassVar[Activation]

    @classmethod
    def forward(cls, ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return elementwise(cls.activation.value, x)

    @classmethod
    def backward(cls, ctx: Any, dy: Any) -> Any:
        (x,), dy = barrier(ctx.saved_tensors, dy)
        return elementwise(lambda dy, x: cls.activation.pull(x, dy), dy, x)

    @staticmethod
    def examples(key: Any, dtype: Any) -> dict[str, Any]:
        return {"infinite": (jnp.array([jnp.inf, -jnp.inf, 1e4, -1e4], dtype),), "empty": (jnp.zeros((0, 5), dtype),)}


class GateFunction(Function):
    """y = f(gate) up, dgate = dy up f'(gate), dup = dy f(gate): saves gate and up, and computes the rest again in the same way."""

    activation: ClassVar[Activation]

    @classmethod
    def forward(cls, ctx: Any, gate: Any, up: Any) -> Any:
        ctx.save_for_backward(gate, up)
        return elementwise(lambda gate, up: cls.activation.value(gate) * up, gate, up)

    @classmethod
    def backward(cls, ctx: Any, dy: Any) -> Any:
        value, pull = cls.activation
        (gate, up), dy = barrier(ctx.saved_tensors, dy)
        return elementwise(lambda dy, gate, up: (pull(gate, dy * up), dy * value(gate)), dy, gate, up)

    @staticmethod
    def examples(key: Any, dtype: Any) -> dict[str, Any]:
        gate, empty = jnp.array([jnp.inf, -jnp.inf, 1e4, -1e4], dtype), jnp.zeros((0, 5), dtype)
        return {"infinite": (gate, jnp.array([2, -3, 4, -5], dtype)), "empty": (empty, empty)}


def draw_one(key: Any, dtype: Any) -> tuple[jax.Array]:
    """An example of x."""
    return (2 * jax.random.normal(key, (3, 5), dtype),)


def draw_two(key: Any, dtype: Any) -> tuple[jax.Array, ...]:
    """An example of gate and up."""
    return tuple(jax.random.normal(k, (3, 5), dtype) for k in jax.random.split(key))


def pair(who: str, gate: Any, up: Any) -> tuple[jax.Array, jax.Array]:
    """Both as arrays, of one shape."""
    gate, up = checks.array(who, "gate", gate), checks.array(who, "up", up)
    if gate.shape != up.shape:
        raise ValueError(f"{who}: gate has shape {gate.shape} and up {up.shape}, but both must have the same: broadcast one to the other")
    return gate, up
