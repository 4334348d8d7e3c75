"""Linear attention whose state forgets what it held for a key before it takes the new value: Gated DeltaNet.

    S_t = exp(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,   out_t = scale q_tᵀ S_t

Within a chunk that starts from the state S, S_i is a sum of decayed k_j u_jᵀ and of S, with

    u_i = β_i (v_i - exp(Σ_{t≤i} g_t) Sᵀ k_i - Σ_{j<i} (k_iᵀ k_j) exp(Σ_{j<t≤i} g_t) u_j)

So U solves (I + A) U = β V - (β exp(Σ g) K) S with the lower triangle A_ij = β_i k_iᵀ k_j exp(Σ_{j<t≤i} g_t), i > j. The inverse is built by halves
(`halves.py`), as those of the two halves of a block and the pairs between them are all there is:

    [[I + A₁, 0], [A₂₁, I + A₂]]⁻¹ = [[T₁, 0], [-T₂ A₂₁ T₁, T₂]]

It does not depend on S. With R the two right-hand sides, U = T β V - (T β exp(Σ g) K) S is known for all chunks but for their state, and

    S_end = exp(Σ_t g_t) S + Σ_j (k_j exp(Σ_{j<t} g_t)) u_jᵀ,   out_i = scale (q_i exp(Σ_{t≤i} g_t))ᵀ S + scale Σ_{j≤i} w_ij u_j

with w_ij as in gated linear attention. What needs no state is computed for as many chunks at once as the machine wants (`chunks.py`), which also
says what backward does.

Saved: q, k, v, g, β (arguments) and the state at the start of each span of chunks.

Reference: Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, section 3.3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.numerics import scaled
from layers.core.products import einsum
from layers.core.recompute import barrier
from layers.core.sharding import sharded_as
from layers.function.function import Function
from layers.recurrent.arguments import check_attention, check_chunk_size
from layers.recurrent.chunks import Chunks, first_state, over_chunks, pull_chunks, run_chunks
from layers.recurrent.gates import visible
from layers.recurrent.halves import Decays, Level, Runs, add_shares, by_chunk, decays, faded, padded, pair_products, weighted_sums
from layers.recurrent.segments import check_segment_ids, runs_of

Rows = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class GatedDeltaRuleFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, runs, scale, chunks):
        out, last, starts = _forward((q, k, v, g, beta), initial, runs, scale, chunks)
        ctx.save_for_backward((q, k, v, g, beta), initial, runs, starts)
        ctx.scale, ctx.chunks = scale, chunks
        return out, last

    @staticmethod
    def backward(ctx, dout, dlast):
        (rows, initial, runs, starts), (dout, dlast) = barrier(ctx.saved_tensors, (dout, dlast))
        state = first_state(initial, rows[0], rows[2])
        dinitial, _, grads = pull_chunks(_body(ctx.scale), (), rows, runs, state, starts, dout, dlast, ctx.chunks)
        return *grads, None if initial is None else dinitial, None, None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, dg, dbeta, dinitial, _runs, _scale, _chunks):
        rows, initial, runs, _ = ctx.saved_tensors
        run = lambda rows, initial: _forward(rows, initial, runs, ctx.scale, ctx.chunks)[:2]
        return jax.jvp(run, (rows, initial), ((dq, dk, dv, dg, dbeta), dinitial))[1]

    @staticmethod
    def example(key, dtype):
        shapes = (1, 5, 1, 2), (1, 5, 1, 2), (1, 5, 1, 3), (1, 5, 1), (1, 5, 1), (1, 1, 2, 3)
        q, k, v, g, beta, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 6), shapes, strict=True))
        return q, k, v, -jnp.abs(g), jax.nn.sigmoid(beta), initial, jnp.array([[0, 0, 1, 1, 1]]), 0.7, Chunks(4, 4)

    @staticmethod
    def examples(key, dtype):
        q, k, v, g, beta, _, _, scale, chunks = GatedDeltaRuleFunction.example(key, dtype)
        return {
            "plain": (q, k, v, g, beta, None, None, scale, chunks),
            "forgets at once": (q, k, v, 1e4 * g, beta, None, None, scale, chunks),
            "writes nothing": (q, k, v, g, 0 * beta, None, None, scale, chunks),
            "no steps": (q[:, :0], k[:, :0], v[:, :0], g[:, :0], beta[:, :0], None, None, scale, chunks),
        }


def _forward(rows: Rows, initial: Any, runs: Any, scale: float, chunks: Chunks) -> tuple[jax.Array, jax.Array, Any]:
    """The output, the last state, and what backward needs of the states at the start of each span."""
    q, _, v, _, _ = rows
    state = first_state(initial, q, v)
    return run_chunks(_body(scale), (), rows, runs, state, sharded_as(jnp.zeros_like(v, q.dtype), v), chunks)


def _body(scale: float) -> Any:
    """A span of chunks: the state after it, and its output."""

    def body(state: jax.Array, _: Any, rows: Any, runs: Runs | None, chunk: int) -> tuple[jax.Array, jax.Array]:
        time = rows[0].shape[1]
        q, k, v, g, beta = (padded(jnp.moveaxis(x, 1, 2), chunk) for x in (*rows[:3], rows[3][..., None], rows[4][..., None]))
        d = decays(g, runs, chunk)
        sides = jnp.concatenate([beta * v, faded(beta * k, d.up, d.since)], -1)
        u = add_shares(sides, [visible(weighted_sums(inverse, level.earlier(sides)), level.second) for level, inverse in _inverse(k, beta, d)])
        u, w = jnp.split(u, [v.shape[3]], -1)
        state, (states, u) = over_chunks(_step, state, _by_chunk(u, visible(w, d.since), k, d, chunk))
        u = u.reshape(v.shape)
        shares = [visible(weighted_sums(_products(level, q, k), level.earlier(u)), level.second) for level in d.levels]
        out = einsum("bhntk,bhnkv->bhntv", by_chunk(faded(q, d.up, d.since), chunk), states).reshape(v.shape)
        out = add_shares(visible(out, d.since), shares) + (q * k).sum(-1, keepdims=True) * u
        return state, jnp.moveaxis(scale * out[:, :, :time], 2, 1)

    return body


def _products(level: Level, q: jax.Array, k: jax.Array) -> jax.Array:
    """q_iᵀ k_j exp(Σ_{j<t≤i} g_t) for the pairs of a level, (..., blocks, half, half)."""
    return pair_products(level.later(q) * jnp.exp(level.up), level.earlier(k) * jnp.exp(level.down))


def _inverse(k: jax.Array, beta: jax.Array, d: Decays) -> list[tuple[Level, jax.Array]]:
    """T = (I + A)⁻¹ below its diagonal of ones: for each level the block of its pairs."""
    whole, blocks = sharded_as(jnp.ones_like(beta), beta)[..., None], []
    for level in d.levels:
        first, second = (whole[:, :, i::2] for i in (0, 1))
        pairs = weighted_sums(_products(level, beta * k, k), _meeting(first, level.first))
        block = -weighted_sums(_meeting(second, level.second), pairs)
        blocks.append((level, block))
        whole = jnp.block([[first, sharded_as(jnp.zeros_like(first), first)], [block, second]])
    return blocks


def _meeting(block: jax.Array, keep: Any) -> jax.Array:
    """`block` with zeros in the rows and columns of steps of another sequence."""
    return block if keep is None else visible(block, keep & jnp.swapaxes(keep, -1, -2))


def _by_chunk(u: jax.Array, w: jax.Array, k: jax.Array, d: Decays, chunk: int) -> tuple[Any, ...]:
    """What `_step` takes of each chunk."""
    last = lambda x: None if x is None else by_chunk(x, chunk)[:, :, :, -1, :, None]
    chunks = (by_chunk(x, chunk) for x in (u, w, faded(k, d.down, d.until), d.since, d.until))
    return *chunks, last(d.up), last(d.since)


def _step(state: jax.Array, now: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The state after a chunk; that before it, and u."""
    u, w, k, since, until, power, goes_on = now
    u = u - visible(einsum("bhtk,bhkv->bhtv", w, state), since)
    return faded(state, power, goes_on) + einsum("bhtk,bhtv->bhkv", k, visible(u, until)), (state, u)


def gated_delta_rule(
    q: Float[Array, "batch time heads features"],
    k: Float[Array, "batch time heads features"],
    v: Float[Array, "batch time heads values"],
    g: Float[Array, "batch time heads"],
    beta: Float[Array, "batch time heads"],
    *,
    scale: float | Float[Array, ""] | None = None,
    initial_state: Float[Array, "batch heads features values"] | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Any:
    """Reads out_t = scale q_tᵀ S_t from the state S_t = exp(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, causally, in time linear in the length.

    Args:
        q: queries.
        k: keys, as a rule of length 1: with a `beta` in [0, 2] the state then does not grow.
        v: values.
        g: the logarithm of the factor by which the state fades at each step, at most 0 for one that does; -inf forgets.
        beta: the share of what the state holds for a key that the value replaces.
        scale: multiplies the output, a number or scalar array, which has a gradient; None for 1 / sqrt(features).
        initial_state: the state before the first step; None for zeros.
        return_state: whether to return the state after the last step too.
        chunk_size: steps whose pairs are taken as products of matrices, a power of 2.
        segment_ids: packed sequences: where the id changes from one step to the next, the state starts again from 0; the first sequence starts
            from `initial_state`.

    Returns:
        An array of the shape of `v` and the dtype of `q`; with `return_state` also the last state, of float32 or wider.

    Raises:
        ValueError: where shapes do not fit, or `chunk_size` is no power of 2.
        TypeError: where an argument is not of a real floating-point dtype, or `segment_ids` not of integers.

    Reference: Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024.
    """
    who = "gated_delta_rule"
    q, k, v, g, beta, scale, initial = check_attention(who, q, k, v, scale, initial_state, by_head={"g": g, "beta": beta})
    keep, chunk_size = checks.flag(who, "return_state", return_state), check_chunk_size(who, chunk_size)
    (batch, time, heads, features), values = q.shape, v.shape[3]
    runs = runs_of(check_segment_ids(who, segment_ids, (batch, time), "(batch, time)", q=q))
    q, scale = scaled(q, scale)
    levels = max(chunk_size.bit_length() - 1, 1)
    step_bytes = 4 * batch * heads * (levels * (8 * features + 6 * values) + 6 * chunk_size + 16 * (features + values))
    out, state = GatedDeltaRuleFunction.apply(q, k, v, g, beta, initial, runs, scale, Chunks.of(chunk_size, time, step_bytes))
    return (out, state) if keep else out
