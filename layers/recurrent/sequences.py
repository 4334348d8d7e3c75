"""The arguments of a recurrent layer, checked and brought to one batch axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.checks import check_floating
from layers.recurrent.gates import SAVES, Plan


@dataclass(frozen=True)
class Sequences:
    """What a gated recurrence runs on.

    Attributes:
        x: (batch, time, features), or (time, batch, features).
        parameters: kernels and biases, of the dtype that products are computed in.
        carry: the states before the first step, (batch, hidden), of the dtype of the outputs.
        lengths: (batch,), or None.
        plan: how to run.
        batch: the batch axes that were given.
    """

    x: jax.Array
    parameters: tuple[Any, ...]
    carry: tuple[jax.Array, ...]
    lengths: Any
    plan: Plan
    batch: tuple[int, ...]

    @property
    def time(self) -> int:
        return self.x.shape[0 if self.plan.time_major else 1]

    def outputs(self, y: jax.Array) -> jax.Array:
        """`y` with the batch axes that were given."""
        return y.reshape(_with_time(self.batch, self.time, self.plan.time_major, y.shape[-1]))

    def states(self, *states: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(s.reshape(*self.batch, s.shape[-1]) for s in states)

    def no_steps(self) -> jax.Array:
        """The outputs where there is no time."""
        return self.outputs(jnp.zeros((0, self.carry[0].shape[-1]), self.carry[0].dtype))


def prepare(
    name: str,
    x: Any,
    kernels: Mapping[str, Any],
    biases: Mapping[str, Any],
    carry: Sequence[Any] | None,
    seq_lengths: Any,
    *,
    gates: int,
    states: int,
    reverse: bool,
    time_major: bool,
    dtype: Any,
    save: str,
) -> Sequences:
    """Checks the arguments of `name`, a cell of so many gates and states; raises ValueError and TypeError."""
    x, kernels = jnp.asarray(x), {key: jnp.asarray(k) for key, k in kernels.items()}
    biases = {key: None if b is None else jnp.asarray(b) for key, b in biases.items()}
    check_floating(name, **{"x": x, **kernels, **biases})
    if x.ndim < 2:
        axes = "(time, *batch, features)" if time_major else "(*batch, time, features)"
        raise ValueError(f"{name}: x has shape {x.shape}, but must be {axes}")
    if save not in SAVES:
        raise ValueError(f"{name}: save is {save!r}, but must be one of {', '.join(map(repr, SAVES))}")
    hidden = _check_parameters(name, x.shape[-1], kernels, biases, gates)
    time, batch = (x.shape[0], x.shape[1:-1]) if time_major else (x.shape[-2], x.shape[:-2])
    dtype = jnp.dtype(dtype or jnp.result_type(x, *kernels.values(), *(b for b in biases.values() if b is not None)))
    size = math.prod(batch)
    return Sequences(
        x.reshape(_with_time((size,), time, time_major, x.shape[-1])),
        tuple(None if p is None else p.astype(dtype) for p in (*kernels.values(), *biases.values())),
        _check_carry(name, carry, states, batch, size, hidden, dtype),
        _check_lengths(name, seq_lengths, batch, size),
        Plan.of(time, size, gates * hidden, time_major=time_major, reverse=bool(reverse), save=save),
        batch,
    )


def _with_time(batch: tuple[int, ...], time: int, time_major: bool, features: int) -> tuple[int, ...]:
    return (time, *batch, features) if time_major else (*batch, time, features)


def _check_parameters(name: str, features: int, kernels: Mapping[str, Any], biases: Mapping[str, Any], gates: int) -> int:
    """The number of hidden features."""
    (key, kernel), (recurrent_key, recurrent) = kernels.items()
    if recurrent.ndim != 2 or recurrent.shape[1] != gates * recurrent.shape[0]:
        raise ValueError(f"{name}: {recurrent_key} has shape {recurrent.shape}, but must be (hidden, {gates} * hidden)")
    hidden = recurrent.shape[0]
    if kernel.shape != (features, gates * hidden):
        raise ValueError(
            f"{name}: {key} has shape {kernel.shape}, but must be (features, {gates} * hidden) = ({features}, {gates * hidden}), "
            f"with the last axis of x and the first of {recurrent_key} {recurrent.shape}"
        )
    for bias_key, b in biases.items():
        if b is not None and b.shape != (gates * hidden,):
            raise ValueError(f"{name}: {bias_key} has shape {b.shape}, but must be ({gates} * hidden,) = ({gates * hidden},)")
    return hidden


def _check_carry(name: str, carry: Any, states: int, batch: tuple[int, ...], size: int, hidden: int, dtype: Any) -> tuple[jax.Array, ...]:
    if carry is None:
        return (jnp.zeros((size, hidden), dtype),) * states
    carry = tuple(jnp.asarray(s) for s in carry)
    if len(carry) != states:
        raise ValueError(f"{name}: initial_carry has {len(carry)} arrays, but must have {states}")
    for s in carry:
        if s.shape != (*batch, hidden):
            raise ValueError(f"{name}: initial_carry holds an array of shape {s.shape}, but must hold (*batch, hidden) = {(*batch, hidden)}")
    check_floating(name, **{"initial_carry": carry[0], "the last of initial_carry": carry[-1]})
    dtype = jnp.result_type(dtype, *carry)
    return tuple(s.reshape(size, hidden).astype(dtype) for s in carry)


def _check_lengths(name: str, lengths: Any, batch: tuple[int, ...], size: int) -> Any:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name}: seq_lengths is of dtype {lengths.dtype}, but must be of integers")
    if lengths.shape != batch:
        raise ValueError(f"{name}: seq_lengths has shape {lengths.shape}, but must have that of the batch, {batch}")
    return lengths.reshape(size)
