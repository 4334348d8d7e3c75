"""h_t = a_t h_{t-1} + b_t and its way back, time first: step by step on a CPU, on an accelerator all steps at once.

A loop over time starts kernels for each step, and an accelerator waits for each. There the steps x ↦ a x + b are composed in pairs, pairs of
pairs and so on, (a', b') ∘ (a, b) = (a' a, a' b + b'), which takes twice the arithmetic in the logarithm of the steps.

Where `resets` is given, a step at which it holds starts from 0, whatever the state before it, and so does a pair that holds such a step.

Reference: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.machine import on_accelerator
from layers.core.numerics import wide
from layers.core.sharding import sharded_as
from layers.recurrent.loops import scan
from layers.recurrent.segments import restart

Steps = tuple[jax.Array, jax.Array, Any]


def run(a: jax.Array, b: jax.Array, start: jax.Array, resets: Any = None) -> jax.Array:
    """Every state, of the dtype of `b`, after `start`; they are held in float32 or wider."""
    start = start.astype(wide(start.dtype))
    if on_accelerator():
        aw, bw = a.astype(start.dtype), b.astype(start.dtype)
        return _composed(aw, bw.at[0].add(restart(_first(resets), aw[0] * start)), resets).astype(b.dtype)

    def step(h: jax.Array, now: Steps) -> tuple[jax.Array, jax.Array]:
        a, b_t, reset = now
        h = restart(reset, a.astype(h.dtype) * h) + b_t.astype(h.dtype)
        return h, h.astype(b.dtype)

    return scan(step, start, (a, b, resets))[1]


def run_back(a: jax.Array, dh: jax.Array, after: Any = None, resets: Any = None) -> tuple[jax.Array, jax.Array]:
    """Every l_t = dh_t + a_{t+1} l_{t+1} of the dtype of `dh`, and a_1 l_1; `after` is the latter of the steps that follow, zeros where None."""
    dtype = wide(dh.dtype)
    after = jnp.zeros_like(dh[0], dtype=dtype) if after is None else after
    if on_accelerator():
        aw, dhw = a.astype(dtype), dh.astype(dtype)
        following = jax.tree.map(lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])]), (aw, resets))
        total = _composed(following[0], dhw.at[-1].add(after), following[1], reverse=True)
        return total.astype(dh.dtype), restart(_first(resets), aw[0] * total[0])

    def step(al: jax.Array, now: Steps) -> tuple[jax.Array, jax.Array]:
        """The product a_t l_t is carried, so that `a` need not be shifted by a step."""
        a, dh_t, reset = now
        total = dh_t.astype(al.dtype) + al
        return restart(reset, a.astype(al.dtype) * total), total.astype(dh.dtype)

    last, total = scan(step, after, (a, dh, resets), reverse=True)
    return total, last


def _composed(a: jax.Array, b: jax.Array, resets: Any, *, reverse: bool = False) -> jax.Array:
    """What all steps up to each make of 0."""

    def after(first: Steps, second: Steps) -> Steps:
        (a1, b1, r1), (a2, b2, r2) = first, second
        grown = jnp.where((b1 == 0) & jnp.isinf(a2), 0, a2 * b1)  # a product of many coefficients overflows where no state does
        return a2 * a1, restart(r2, grown) + b2, None if r2 is None else r1 | r2

    return lax.associative_scan(after, (a, b, resets), reverse=reverse)[1]


def before(start: jax.Array, states: jax.Array) -> jax.Array:
    """The state before each step, from that before the first one and those after each."""
    return jnp.concatenate([sharded_as(start[None].astype(states.dtype), states), states[:-1]])


def _first(resets: Any) -> Any:
    return None if resets is None else resets[0]
