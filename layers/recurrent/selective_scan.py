"""The selective scan of Mamba: a diagonal state-space model whose step, input and output vary with time.

For each feature and each of its states, with bias and softplus where asked for,

    d_t = softplus(delta_t + bias),   h_t = exp(d_t A) h_{t-1} + d_t u_t B_t
    y_t = Σ_state C_t h_t + D u_t,    out_t = y_t silu(z_t)

Backward  dy_t = silu(z_t) dout_t,   dz_t = y_t silu'(z_t) dout_t,   dD = Σ u_t dy_t
          l_t = C_t dy_t + exp(d_{t+1} A) l_{t+1}          (the gradient of h_t in all),   dC_t = Σ_features h_t dy_t
          w_t = l_t exp(d_t A) h_{t-1}                     (the gradient of d_t A),        dA = Σ_t d_t w_t
          r_t = Σ_state B_t l_t                            (the gradient of d_t u_t),      dB_t = Σ_features d_t u_t l_t
          du_t = d_t r_t + D dy_t,   dd_t = u_t r_t + Σ_state A w_t,   ddelta_t = softplus'(delta_t + bias) dd_t

Saved: the arguments and the state at the start of every chunk of `CHUNK` steps. Backward computes the states of a chunk again, so that the
states of the whole sequence, `state` times the size of u, are nowhere at once. States lie as (batch, state, features): sums over states are
then sums of rows. Where a packed sequence starts, exp(d_t A) h_{t-1} and its gradient are 0, and so they are where A is -inf.

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core import checks, machine
from layers.core.elementwise import SILU
from layers.core.machine import on_accelerator
from layers.core.numerics import wide
from layers.core.products import einsum
from layers.core.recompute import barrier
from layers.function.function import Function
from layers.kernels.dispatch import NAMES, XLA, choose
from layers.kernels.selective_scan import KERNELS
from layers.recurrent import scan_by_kernel
from layers.recurrent.arguments import check_inputs
from layers.recurrent.loops import cut, fold_chunks, put, scan, with_first, without_first
from layers.recurrent.segments import check_segment_ids, resets_of, restart
from layers.recurrent.selective_states import Chunk, Inputs, decay, first_state, gradients_of_states, parameters, read, states_of, sum_states

CHUNK, FAR_CHUNK = 32, 256
"""Steps between two states that are kept: on a CPU the states of a chunk stay in a core's cache, on an accelerator they are computed together."""


class SelectiveScanFunction(Function):
    @staticmethod
    def forward(ctx, u, delta, a, b, c, d, z, bias, initial, resets, softplus, chunk, implementation=XLA):
        inputs = Inputs(u, delta, a, b, c, d, z, bias, initial)
        if implementation == XLA:
            out, last, starts = _forward(inputs, resets, softplus, chunk)
        else:
            out, last, starts = scan_by_kernel.forward(inputs, parameters(inputs)[0], first_state(inputs), softplus, implementation)
        ctx.save_for_backward(inputs, resets, starts)
        ctx.softplus, ctx.chunk, ctx.implementation = softplus, chunk, implementation
        return out, last

    @staticmethod
    def backward(ctx, dout, dlast):
        (x, resets, starts), (dout, dlast) = barrier(ctx.saved_tensors, (dout, dlast))
        a, d = parameters(x)
        if ctx.implementation != XLA:
            grads = scan_by_kernel.backward(x, a, starts, dout, dlast, ctx.softplus, ctx.implementation)
            return *grads, None, None, None, None
        starts = with_first(starts, first_state(x), x.u.shape[1], ctx.chunk)

        def step(carry, start, size, state):
            after, da, dd, dbias, buffers = carry
            chunk = Chunk.of(x, resets, start, size, ctx.softplus)
            dy = cut(dout, start, size, after.dtype)
            fade, decayed, h = states_of(a, chunk, state)
            dz = None
            if chunk.z is not None:
                y = read(h, chunk.c) + d * chunk.u
                dz, dy = SILU.pull(chunk.z, dy * y), dy * SILU.value(chunk.z)
            dc = einsum("tbnd,tbd->tbn", h, dy)
            after, dh = gradients_of_states(fade, chunk, dy, after)
            w, r = dh * decayed, read(dh, chunk.b)
            drate = r * chunk.u + sum_states(w * a)
            ddelta = drate * jax.nn.sigmoid(chunk.raw) if ctx.softplus else drate
            rows = (r * chunk.rate + d * dy, ddelta, einsum("tbnd,tbd->tbn", dh, chunk.drive), dc, dz)
            buffers = jax.tree.map(lambda into, v: put(into, v, start), buffers, rows)
            da = da + (w * chunk.rate[:, :, None]).sum((0, 1))
            return (after, da, dd + (dy * chunk.u).sum((0, 1)), dbias + ddelta.sum((0, 1)), buffers), None

        dtype = wide(x.u.dtype)
        sums = (jnp.zeros(a.shape, dtype), jnp.zeros(a.shape[1:], dtype), jnp.zeros(a.shape[1:], dtype))
        buffers = jax.tree.map(jnp.zeros_like, (x.u, x.delta, x.b, x.c, x.z))
        carry = (jnp.swapaxes(dlast, 1, 2).astype(dtype), *sums, buffers)
        carry, _ = fold_chunks(step, carry, x.u.shape[1], ctx.chunk, starts, reverse=True, beside=(x, dout))
        dstate, da, dd, dbias, (du, ddelta, db, dc, dz) = carry
        dinitial = None if x.initial is None else jnp.swapaxes(dstate, 1, 2)
        return du, ddelta, da.T, db, dc, None if x.d is None else dd, dz, None if x.bias is None else dbias, dinitial, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        x, resets, _ = ctx.saved_tensors
        return jax.jvp(lambda x: _forward(x, resets, ctx.softplus, ctx.chunk)[:2], (x,), (Inputs(*tangents[: len(Inputs._fields)]),))[1]

    @staticmethod
    def example(key, dtype):
        shapes = (1, 3, 3), (1, 3, 3), (3, 2), (1, 3, 2), (1, 3, 2), (3,), (1, 3, 3), (3,), (1, 3, 2)
        u, delta, a, b, c, d, z, bias, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 9), shapes, strict=True))
        return u, delta, -jnp.exp(a), b, c, d, z, bias, initial, jnp.array([[False, True, False]]), True, 2

    @staticmethod
    def examples(key, dtype):
        u, delta, a, b, c, *_ = SelectiveScanFunction.example(key, dtype)
        rest = None, None, None, None, None, False, 2
        return {
            "plain": (u, jnp.abs(delta), a, b, c, *rest),
            "forgets at once": (u, jnp.abs(delta), 1e4 * a, b, c, *rest),
            "forgets nothing": (u, 0 * delta, a, b, c, *rest),
            "an infinite rate": (u, jnp.abs(delta), a.at[0, 0].set(-jnp.inf), b, c, *rest),
            "no steps": (u[:, :0], delta[:, :0], a, b[:, :0], c[:, :0], *rest),
        }


def _forward(x: Inputs, resets: Any, softplus: bool, size: int) -> tuple[jax.Array, jax.Array, Any]:
    """The output, the last state as (batch, features, state), and what backward needs of the states at the start of each chunk."""
    a, d = parameters(x)

    def step(carry, start, length, _):
        state, out = carry
        chunk = Chunk.of(x, resets, start, length, softplus)

        def one(h, t):
            rate, drive, b, c, reset = t
            h = restart(reset, decay(rate[:, None], a) * h) + drive[:, None] * b[:, :, None]
            return h, (h * c[:, :, None]).sum(1)

        if on_accelerator():
            h = states_of(a, chunk, state)[2]
            last, y = h[-1], read(h, chunk.c)
        else:  # the states of a chunk need not be there at once
            last, y = scan(one, state, (chunk.rate, chunk.drive, chunk.b, chunk.c, chunk.resets), beside=a)
        y = y + d * chunk.u
        return (last, put(out, y if chunk.z is None else y * SILU.value(chunk.z), start)), state

    (last, out), starts = fold_chunks(step, (first_state(x), jnp.zeros_like(x.u)), x.u.shape[1], size, beside=x)
    return out, jnp.swapaxes(last, 1, 2), without_first(starts)


def selective_scan(
    u: Float[Array, "batch time features"],
    delta: Float[Array, "batch time features"],
    A: Float[Array, "features state"],
    B: Float[Array, "batch time state"],
    C: Float[Array, "batch time state"],
    D: Float[Array, " features"] | None = None,
    *,
    z: Float[Array, "batch time features"] | None = None,
    delta_bias: Float[Array, " features"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Array, "batch features state"] | None = None,
    return_last_state: bool = False,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> Any:
    """Runs h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and reads y_t = C_t h_t + D u_t from it.

    Args:
        u: inputs.
        delta: step sizes.
        A: rates, negative for a state that fades; -inf for one that is forgotten at once.
        B: how the input enters each state.
        C: how each state is read.
        D: the share of the input that goes straight to the output; None for 0.
        z: a gate; the output is multiplied by silu(z). None for no gate.
        delta_bias: is added to `delta`.
        delta_softplus: whether step sizes are softplus(delta + delta_bias).
        initial_state: the state before the first step; None for zeros.
        return_last_state: whether to return the state after the last step too.
        segment_ids: packed sequences: where the id changes from one step to the next, the state starts again from 0; the first sequence starts
            from `initial_state`.
        implementation: None takes the fastest that can do the call and was verified for it on what is compiled for; "xla" or "mosaic" (a kernel for
            NVIDIA's Hopper) that one, with the derivatives of this layer at every order. `layers.implementations` says which and why.

    Returns:
        An array of the shape and dtype of `u`; with `return_last_state` also the last state, (batch, features, state), of float32 or wider.

    Raises:
        ValueError: where a shape does not fit `u` and `A`, or for an implementation that cannot do the call.
        TypeError: where an argument is not of a real floating-point dtype, or `segment_ids` not of integers.

    Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; the meanings of the arguments are those of
    `selective_scan_fn` of its authors, with time before features.
    """
    who, arrays = "selective_scan", (u, delta, A, B, C, D, z, delta_bias, initial_state)
    given, _ = check_inputs(who, _NAMES, _AXES, arrays, required=5, sized=("u", "a"))
    softplus, keep = (checks.flag(who, *x) for x in (("delta_softplus", delta_softplus), ("return_last_state", return_last_state)))
    resets = resets_of(check_segment_ids(who, segment_ids, given.u.shape[:2], "(batch, time)", u=given.u), 1)
    checks.choice("selective_scan", "implementation", implementation, (None, *NAMES))
    way = choose("selective_scan", scan_by_kernel.describe(given, resets), KERNELS, implementation)
    out, last = SelectiveScanFunction.apply(*given, resets, softplus, machine.choose(CHUNK, FAR_CHUNK), way)
    return (out, last) if keep else out


_NAMES = Inputs("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
_AXES = Inputs(
    "(batch, time, features)",
    "(batch, time, features)",
    "(features, state)",
    "(batch, time, state)",
    "(batch, time, state)",
    "(features,)",
    "(batch, time, features)",
    "(features,)",
    "(batch, features, state)",
)
