"""The states of a selective scan over a chunk of steps, and their gradients; the symbols are those of `selective_scan.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.machine import on_accelerator
from layers.core.numerics import wide
from layers.recurrent.loops import cut, scan
from layers.recurrent.recurrence import before, run, run_back
from layers.recurrent.segments import restart


class Inputs(NamedTuple):
    """The arguments of `selective_scan`; those that may be None at the end."""

    u: Any
    delta: Any
    a: Any
    b: Any
    c: Any
    d: Any
    z: Any
    bias: Any
    initial: Any


class Chunk(NamedTuple):
    """What one chunk is computed from, (time, batch, ...), in the wide dtype: the raw and final step sizes, and their product with u."""

    u: jax.Array
    raw: jax.Array
    rate: jax.Array
    drive: jax.Array
    b: jax.Array
    c: jax.Array
    z: Any
    resets: Any

    @staticmethod
    def of(x: Inputs, resets: Any, start: Any, size: int, softplus: bool) -> Chunk:
        dtype = wide(x.u.dtype)
        u, raw, b, c = (cut(v, start, size, dtype) for v in (x.u, x.delta, x.b, x.c))
        raw = raw if x.bias is None else raw + x.bias.astype(dtype)
        rate = jax.nn.softplus(raw) if softplus else raw
        z = None if x.z is None else cut(x.z, start, size, dtype)
        return Chunk(u, raw, rate, rate * u, b, c, z, None if resets is None else cut(resets, start, size, bool)[..., None, None])


def parameters(x: Inputs) -> tuple[jax.Array, Any]:
    """A as (state, features), the least finite number for -inf, and D or 0."""
    dtype = wide(x.u.dtype)
    return jnp.maximum(x.a.T.astype(dtype), jnp.finfo(dtype).min), 0 if x.d is None else x.d.astype(dtype)


@jax.custom_jvp
def decay(rate: jax.Array, a: jax.Array) -> jax.Array:
    """exp(rate a); where it is 0 its tangent is 0 however large `a` is."""
    return jnp.exp(rate * a)


@decay.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (rate, a), (drate, da) = primals, tangents
    fade = decay(rate, a)
    return fade, (fade * a) * drate + (fade * rate) * da


def first_state(x: Inputs) -> jax.Array:
    """(batch, state, features), zeros where none is given."""
    dtype, shape = wide(x.u.dtype), (x.u.shape[0], x.a.shape[1], x.u.shape[2])
    return jnp.zeros(shape, dtype) if x.initial is None else jnp.swapaxes(x.initial, 1, 2).astype(dtype)


def states_of(a: jax.Array, chunk: Chunk, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(d_t A), exp(d_t A) h_{t-1} and h_t for the steps of a chunk."""
    if on_accelerator():
        fade = decay(chunk.rate[:, :, None], a)
        h = run(fade, chunk.drive[:, :, None] * chunk.b[..., None], state, chunk.resets)
        return fade, restart(chunk.resets, fade * before(state, h)), h

    def one(h, t):
        rate, drive, b, reset = t
        fade = decay(rate[:, None], a)
        decayed = restart(reset, fade * h)
        h = decayed + drive[:, None] * b[:, :, None]
        return h, (fade, decayed, h)

    return scan(one, state, (chunk.rate, chunk.drive, chunk.b, chunk.resets), beside=a)[1]


def gradients_of_states(fade: jax.Array, chunk: Chunk, dy: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(d A) l at the first step of a chunk, and l_t, the gradient of h_t, for each; `after` is the former of the chunk after it."""
    if on_accelerator():
        dh, first = run_back(fade, chunk.c[..., None] * dy[:, :, None], after, chunk.resets)
        return first, dh

    def one(after, t):
        fade, c, dy, reset = t
        dh = after + c[:, :, None] * dy[:, None]
        return restart(reset, fade * dh), dh

    return scan(one, after, (fade, chunk.c, dy, chunk.resets), reverse=True)


def read(states: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_state weights states, for (time, batch, state, features) and (time, batch, state)."""
    return (states * weights[..., None]).sum(2)


def sum_states(x: jax.Array) -> jax.Array:
    """Σ_state x, for (time, batch, state, features), by halves: XLA's CPU compiler does not vectorize a sum over an axis in the middle."""
    while (states := x.shape[2]) > 1:
        half = states // 2
        pairs = x[:, :, :half] + x[:, :, half : 2 * half]
        x = pairs if states % 2 == 0 else jnp.concatenate([pairs, x[:, :, -1:]], 2)
    return x.sum(2)
