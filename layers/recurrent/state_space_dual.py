"""The state-space model of Mamba-2: one rate for a whole head, so that a chunk is a product of matrices, as attention is.

For each head, with bias and softplus where asked for,

    d_t = softplus(dt_t + bias),   h_t = exp(d_t A) h_{t-1} + d_t B_t x_tᵀ
    y_t = C_tᵀ h_t + D x_t,        out_t = y_t silu(z_t)

Heads of a group share B and C. Within a chunk that starts from the state h,

    y_i = exp(Σ_{t≤i} d_t A) C_iᵀ h + Σ_{j≤i} (C_iᵀ B_j) exp(Σ_{j<t≤i} d_t A) d_j x_j + D x_i

The pairs j < i are taken by halves (`halves.py`): C_iᵀ B_j once for all heads of a group, and the decay as a factor exp(down_j) of d_j x_j and one
exp(up_i) of the sum over j. What needs no state is computed for as many chunks at once as the machine wants (`chunks.py`), which also says what
backward does.

Saved: the arguments and the state at the start of each span of chunks.

Reference: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality", 2024, section 6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.elementwise import SILU, differentiable
from layers.core.numerics import wide
from layers.core.products import einsum
from layers.core.recompute import barrier
from layers.core.sharding import sharded_as
from layers.function.function import Function
from layers.recurrent.arguments import check_chunk_size, check_inputs
from layers.recurrent.chunks import Chunks, over_chunks, pull_chunks, run_chunks
from layers.recurrent.gates import visible
from layers.recurrent.halves import Runs, add_shares, by_chunk, decays, faded, padded, pair_products, weighted_sums
from layers.recurrent.segments import check_segment_ids, runs_of


class Inputs(NamedTuple):
    """The arguments of `state_space_dual`; those that may be None at the end."""

    x: Any
    dt: Any
    a: Any
    b: Any
    c: Any
    d: Any
    z: Any
    bias: Any
    initial: Any


class StateSpaceDualFunction(Function):
    @staticmethod
    def forward(ctx, x, dt, a, b, c, d, z, bias, initial, runs, softplus, chunks):
        inputs = Inputs(x, dt, a, b, c, d, z, bias, initial)
        out, last, starts = _forward(inputs, runs, softplus, chunks)
        ctx.save_for_backward(inputs, runs, starts)
        ctx.softplus, ctx.chunks = softplus, chunks
        return out, last

    @staticmethod
    def backward(ctx, dout, dlast):
        (x, runs, starts), (dout, dlast) = barrier(ctx.saved_tensors, (dout, dlast))
        parameters, rows = _parts(x)
        dlast = jnp.swapaxes(dlast, 2, 3)
        dstate, (da, dd, dbias), (dx, ddt, db, dc, dz) = pull_chunks(
            _body(ctx.softplus), parameters, rows, runs, _first_state(x), starts, dout, dlast, ctx.chunks
        )
        return dx, ddt, da, db, dc, dd, dz, dbias, None if x.initial is None else jnp.swapaxes(dstate, 2, 3), None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        x, runs, _ = ctx.saved_tensors
        return jax.jvp(lambda x: _forward(x, runs, ctx.softplus, ctx.chunks)[:2], (x,), (Inputs(*tangents[:-3]),))[1]

    @staticmethod
    def example(key, dtype):
        shapes = (1, 3, 2, 3), (1, 3, 2), (2,), (1, 3, 1, 2), (1, 3, 1, 2), (2,), (1, 3, 2, 3), (2,), (1, 2, 3, 2)
        x, dt, a, b, c, d, z, bias, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 9), shapes, strict=True))
        return x, dt, -jnp.exp(a), b, c, d, z, bias, initial, jnp.array([[0, 1, 1]]), True, Chunks(2, 2)

    @staticmethod
    def examples(key, dtype):
        x, dt, a, b, c, *_ = StateSpaceDualFunction.example(key, dtype)
        rest = None, None, None, None, None, False, Chunks(2, 2)
        return {
            "plain": (x, jnp.abs(dt), a, b, c, *rest),
            "forgets at once": (x, jnp.abs(dt), 1e4 * a, b, c, *rest),
            "forgets nothing": (x, 0 * dt, a, b, c, *rest),
            "no steps": (x[:, :0], dt[:, :0], a, b[:, :0], c[:, :0], *rest),
        }


def _parts(x: Inputs) -> tuple[Any, Any]:
    """What all steps share, wide, and what each has of its own."""
    dtype = wide(x.x.dtype)
    return jax.tree.map(lambda p: p.astype(dtype), (x.a, x.d, x.bias)), (x.x, x.dt, x.b, x.c, x.z)


def _first_state(x: Inputs) -> jax.Array:
    """(batch, heads, state, head_dim), zeros where none is given."""
    batch, _, heads, size = x.x.shape
    dtype, shape = wide(x.x.dtype), (batch, heads, x.b.shape[3], size)
    return sharded_as(jnp.zeros(shape, dtype), x.x.sum(1)) if x.initial is None else jnp.swapaxes(x.initial, 2, 3).astype(dtype)


def _forward(x: Inputs, runs: Any, softplus: bool, chunks: Chunks) -> tuple[jax.Array, jax.Array, Any]:
    """The output, the last state as (batch, heads, head_dim, state), and what backward needs of the states at the start of each span."""
    parameters, rows = _parts(x)
    out, last, starts = run_chunks(_body(softplus), parameters, rows, runs, _first_state(x), x.x, chunks)
    return out, jnp.swapaxes(last, 2, 3), starts


def _body(softplus: bool) -> Any:
    """A span of chunks: the state after it, and its output."""

    def body(state: jax.Array, parameters: Any, rows: Any, runs: Runs | None, chunk: int) -> tuple[jax.Array, jax.Array]:
        (a, d, bias), (x, dt, b, c, z) = parameters, rows
        raw = dt if bias is None else dt + bias
        rate = jax.nn.softplus(raw) if softplus else raw
        first = lambda x: padded(jnp.moveaxis(x, 1, 2), chunk)
        state, y = _read(state, first(c), first(b), first(rate[..., None] * x), first(_exponent(rate, a)[..., None]), runs, chunk)
        y = jnp.moveaxis(y, 2, 1)[:, : x.shape[1]]
        y = y if d is None else y + d[:, None] * x
        return state, y if z is None else y * differentiable(SILU)(z)

    return body


def _exponent(rate: jax.Array, a: jax.Array) -> jax.Array:
    """rate a; without a gradient where `a` is -inf and nothing is left of the state."""
    forgets, least = a == -jnp.inf, jnp.finfo(a.dtype).min
    return jnp.where(forgets, lax.stop_gradient(rate) * least, rate * jnp.where(forgets, 0, a))


def _read(state: jax.Array, c: jax.Array, b: jax.Array, v: jax.Array, g: jax.Array, runs: Runs | None, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The state after some chunks and C_tᵀ h_t at each step: of c and b (batch, groups, time, state), v and g (batch, heads, time, ...)."""
    groups, d = b.shape[1], decays(g, runs, chunk)
    grouped = lambda x: x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    heads = lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    shares = []
    for level in d.levels:
        products = pair_products(level.later(c), level.earlier(b))
        sums = heads(weighted_sums(products, grouped(level.earlier(v) * jnp.exp(level.down)), "bgnij,bgrnjv->bgrniv"))
        shares.append(visible(sums * jnp.exp(level.up), level.second))
    values = grouped(by_chunk(faded(v, d.down, d.until), chunk))
    added = heads(einsum("bgntk,bgrntv->bgrnkv", by_chunk(visible(b, d.until), chunk), values))
    goes_on = None if d.since is None else by_chunk(d.since, chunk)[:, :, :, -1, :, None]

    def step(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        power, keep, more = now
        return faded(state, power, keep) + more, state

    state, states = over_chunks(step, state, (by_chunk(d.up, chunk)[:, :, :, -1, :, None], goes_on, added))
    out = heads(einsum("bgntk,bgrnkv->bgrntv", by_chunk(visible(c, d.since), chunk), grouped(states))).reshape(v.shape)
    out = add_shares(faded(out, d.up, d.since), shares)
    return state, out + heads((c * b).sum(-1)[:, :, None, :, None] * grouped(v))


def state_space_dual(
    x: Float[Array, "batch time heads head_dim"],
    dt: Float[Array, "batch time heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch time groups state"],
    C: Float[Array, "batch time groups state"],
    D: Float[Array, " heads"] | None = None,
    *,
    z: Float[Array, "batch time heads head_dim"] | None = None,
    dt_bias: Float[Array, " heads"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "batch heads head_dim state"] | None = None,
    return_last_state: bool = False,
    chunk_size: int = 64,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Any:
    """Runs h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ for each head and reads y_t = h_t C_t + D x_t from it.

    Args:
        x: inputs.
        dt: step sizes.
        A: the rate of each head, negative for a state that fades; -inf for one that is forgotten at once.
        B: how the input enters each state, for each group of successive heads.
        C: how each state is read, the same.
        D: the share of the input that goes straight to the output; None for 0.
        z: a gate; the output is multiplied by silu(z). None for no gate.
        dt_bias: is added to `dt`.
        dt_softplus: whether step sizes are softplus(dt + dt_bias).
        initial_state: the state before the first step; None for zeros.
        return_last_state: whether to return the state after the last step too.
        chunk_size: steps whose pairs are taken as products of matrices, a power of 2.
        segment_ids: packed sequences: where the id changes from one step to the next, the state starts again from 0; the first sequence starts
            from `initial_state`.

    Returns:
        An array of the shape and dtype of `x`; with `return_last_state` also the last state, (batch, heads, head_dim, state), of float32 or wider.

    Raises:
        ValueError: where a shape does not fit, or `chunk_size` is no power of 2.
        TypeError: where an argument is not of a real floating-point dtype, or `segment_ids` not of integers.

    Reference: Dao and Gu, "Transformers are SSMs", 2024; the meanings of the arguments are those of `mamba_chunk_scan_combined` of its authors.
    """
    who, arrays = "state_space_dual", (x, dt, A, B, C, D, z, dt_bias, initial_state)
    given, sizes = check_inputs(who, _NAMES, _AXES, arrays, required=5, sized=("x", "b"))
    if not sizes["groups"] or sizes["heads"] % sizes["groups"]:
        raise ValueError(f"{who}: B has {sizes['groups']} groups, but must have a number that divides the {sizes['heads']} heads of x")
    softplus, keep = (checks.flag(who, *v) for v in (("dt_softplus", dt_softplus), ("return_last_state", return_last_state)))
    chunk_size = check_chunk_size(who, chunk_size)
    (batch, time, heads, size), (groups, state) = given.x.shape, given.b.shape[2:]
    runs = runs_of(check_segment_ids(who, segment_ids, (batch, time), "(batch, time)", x=given.x))
    levels = max(chunk_size.bit_length() - 1, 1)
    step_bytes = 4 * batch * (heads * (size * (5 * levels + 8) + chunk_size) + groups * (state * (2 * levels + 4) + 2 * chunk_size))
    out, last = StateSpaceDualFunction.apply(*given, runs, softplus, Chunks.of(chunk_size, time, step_bytes))
    return (out, last) if keep else out


_NAMES = Inputs("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
_AXES = Inputs(
    "(batch, time, heads, head_dim)",
    "(batch, time, heads)",
    "(heads,)",
    "(batch, time, groups, state)",
    "(batch, time, groups, state)",
    "(heads,)",
    "(batch, time, heads, head_dim)",
    "(heads,)",
    "(batch, heads, head_dim, state)",
)
