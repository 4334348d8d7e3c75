"""The arguments of a recurrent layer, checked and brought to one batch axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.recurrent.gates import SAVES, Plan
from layers.recurrent.segments import check_segment_ids, resets_of

KERNELS: tuple[str, str] = ("input_kernel", "recurrent_kernel")


@dataclass(frozen=True)
class Sequences:
    """What a gated recurrence runs on.

    Attributes:
        x: (batch, time, features), or (time, batch, features).
        parameters: kernels and biases, of the dtype that products are computed in.
        carry: the states before the first step, (batch, hidden), of the dtype of the outputs.
        lengths: (batch,), or None.
        resets: whether a packed sequence starts at a step, (batch, time, 1) or (time, batch, 1), or None.
        plan: how to run.
        batch: the batch axes that were given.
    """

    x: jax.Array
    parameters: tuple[Any, ...]
    carry: tuple[jax.Array, ...]
    lengths: Any
    resets: Any
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
    who: str,
    x: Any,
    kernels: Mapping[str, Any],
    biases: Mapping[str, Any],
    carry: Sequence[Any] | None,
    seq_lengths: Any,
    segment_ids: Any,
    *,
    gates: int,
    states: int,
    reverse: bool,
    time_major: bool,
    dtype: Any,
    save: str,
) -> Sequences:
    """Checks the arguments of `who`, a cell of so many gates and states; raises ValueError and TypeError."""
    reverse, time_major = checks.flag(who, "reverse", reverse), checks.flag(who, "time_major", time_major)
    save, dtype = checks.choice(who, "save", save, SAVES), checks.dtype(who, "dtype", dtype)
    x = checks.array(who, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{who}: x has shape {x.shape}, but must be {'(time, *batch, features)' if time_major else '(*batch, time, features)'}")
    kernels = {key: checks.array(who, key, k, ndim=2) for key, k in kernels.items()}
    biases = {key: checks.array(who, key, b, optional=True) for key, b in biases.items()}
    hidden = _check_parameters(who, x, kernels, biases, gates)
    time, batch = (x.shape[0], x.shape[1:-1]) if time_major else (x.shape[-2], x.shape[:-2])
    dtype = dtype or jnp.result_type(x, *kernels.values(), *(b for b in biases.values() if b is not None))
    size, lengths = math.prod(batch), checks.array(who, "seq_lengths", seq_lengths, "integer", optional=True)
    checks.shape(who, "seq_lengths", lengths, batch, "the batch axes of x", x=x)
    ids = check_segment_ids(who, segment_ids, x.shape[:-1], "(time, *batch)" if time_major else "(*batch, time)", x=x)
    return Sequences(
        x.reshape(_with_time((size,), time, time_major, x.shape[-1])),
        tuple(None if p is None else p.astype(dtype) for p in (*kernels.values(), *biases.values())),
        _check_carry(who, carry, states, batch, size, hidden, dtype),
        None if lengths is None else lengths.reshape(size),
        None if ids is None else _resets(ids, lengths, time_major, reverse).reshape(_with_time((size,), time, time_major, 1)),
        Plan.of(time, size, gates * hidden, time_major=time_major, reverse=reverse, save=save),
        batch,
    )


def _with_time(batch: tuple[int, ...], time: int, time_major: bool, features: int) -> tuple[int, ...]:
    return (time, *batch, features) if time_major else (*batch, time, features)


def _check_parameters(who: str, x: jax.Array, kernels: Mapping[str, Any], biases: Mapping[str, Any], gates: int) -> int:
    """The number of hidden features."""
    (key, kernel), (recurrent_key, recurrent) = kernels.items()
    if recurrent.shape[1] != gates * recurrent.shape[0]:
        raise ValueError(f"{who}: {recurrent_key} has shape {recurrent.shape}, but must be (hidden, {gates} * hidden)")
    hidden = recurrent.shape[0]
    checks.shape(who, key, kernel, (x.shape[-1], gates * hidden), f"(features, {gates} * hidden)", x=x, **{recurrent_key: recurrent})
    for bias_key, b in biases.items():
        checks.shape(who, bias_key, b, (gates * hidden,), f"({gates} * hidden,)", **{recurrent_key: recurrent})
    return hidden


def _check_carry(who: str, carry: Any, states: int, batch: tuple[int, ...], size: int, hidden: int, dtype: Any) -> tuple[jax.Array, ...]:
    if carry is None:
        return (jnp.zeros((size, hidden), dtype),) * states
    if not isinstance(carry, (tuple, list)) or len(carry) != states:
        raise ValueError(f"{who}: initial_carry is {checks.shown(carry)}, but must be a tuple of {states} arrays")
    carry = tuple(checks.array(who, "initial_carry", s) for s in carry)
    for s in carry:
        checks.shape(who, "initial_carry", s, (*batch, hidden), "(*batch, hidden)")
    dtype = jnp.result_type(dtype, *carry)
    return tuple(s.reshape(size, hidden).astype(dtype) for s in carry)


def _resets(ids: jax.Array, lengths: Any, time_major: bool, reverse: bool) -> jax.Array:
    """Where packed sequences start; the first step that is run is no such, also where it is preceded by padding."""
    axis = 0 if time_major else -1
    resets = resets_of(ids, axis, reverse=reverse)
    if lengths is None or not reverse:
        return resets
    after = 1 + jnp.arange(ids.shape[axis])
    return resets & (after.reshape(-1, *(1 for _ in lengths.shape)) < lengths if time_major else after < lengths[..., None])
