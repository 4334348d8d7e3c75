"""Packed sequences: several in one row, told apart by an id for each step.

A sequence is a run of steps with the same id; the state starts again from zeros where the id changes. What was before is not multiplied by 0 there,
which would let NaN and infinity through, but left out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks


def check_segment_ids(who: str, ids: Any, sizes: tuple[int, ...], axes: str, **beside: Any) -> Any:
    """The ids as an array, or None; raises TypeError unless they are integers, and ValueError unless they are of these sizes, those of `axes`."""
    ids = checks.array(who, "segment_ids", ids, "integer", optional=True)
    checks.shape(who, "segment_ids", ids, sizes, axes, **beside)
    return ids


def resets_of(ids: Any, axis: int, *, reverse: bool = False) -> Any:
    """Whether a step is the first one of a sequence that is not the first to be run; None where there are no ids."""
    if ids is None:
        return None
    ids = jnp.moveaxis(ids, axis, 0)
    before = [ids[1:], ids[-1:]] if reverse else [ids[:1], ids[:-1]]
    return jnp.moveaxis(ids != jnp.concatenate(before), 0, axis)


def runs_of(ids: Any) -> Any:
    """The number of each step's sequence, (batch, time), from 0 on; None where there are no ids."""
    return None if ids is None else jnp.cumsum(resets_of(ids, 1), 1, dtype=jnp.int32)


def restart(resets: Any, state: Any) -> Any:
    """Zeros where a sequence starts, else `state`: a pytree of arrays that `resets` broadcasts to."""
    return state if resets is None else jax.tree.map(lambda s: jnp.where(resets, jnp.zeros((), s.dtype), s), state)
