"""Linear attention whose state fades by a factor of its own for each feature, in chunks of matrix products.

    S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,   out_t = scale q_tᵀ S_t

Within a chunk that starts from the state S,

    out_i = scale (q_i exp(Σ_{t≤i} g_t))ᵀ S + scale Σ_{j≤i} w_ij v_j,   w_ij = Σ_feature q_i k_j exp(Σ_{j<t≤i} g_t)

The pairs j < i are taken by halves (`halves.py`): for i in the second half of a block and j in the first

    w_ij = (q_i exp(up_i))ᵀ (k_j exp(down_j))

is a product of two matrices. The state after the chunk is exp(Σ_t g_t) S + Σ_j (k_j exp(Σ_{j<t} g_t)) v_jᵀ: its second term and all w_ij need no
state, and are computed for as many chunks at once as the machine wants (`chunks.py`), which also says what backward does.

Saved: q, k, v, g (arguments) and the state at the start of each span of chunks.

Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023.
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
from layers.recurrent.halves import Runs, add_shares, by_chunk, decays, faded, padded, pair_products, weighted_sums
from layers.recurrent.segments import check_segment_ids, runs_of

Rows = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class GatedLinearAttentionFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, g, initial, runs, scale, chunks):
        out, last, starts = _forward((q, k, v, g), initial, runs, scale, chunks)
        ctx.save_for_backward((q, k, v, g), initial, runs, starts)
        ctx.scale, ctx.chunks = scale, chunks
        return out, last

    @staticmethod
    def backward(ctx, dout, dlast):
        (rows, initial, runs, starts), (dout, dlast) = barrier(ctx.saved_tensors, (dout, dlast))
        state = first_state(initial, rows[0], rows[2])
        dinitial, _, grads = pull_chunks(_body(ctx.scale), (), rows, runs, state, starts, dout, dlast, ctx.chunks)
        return *grads, None if initial is None else dinitial, None, None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, dg, dinitial, _runs, _scale, _chunks):
        rows, initial, runs, _ = ctx.saved_tensors
        run = lambda rows, initial: _forward(rows, initial, runs, ctx.scale, ctx.chunks)[:2]
        return jax.jvp(run, (rows, initial), ((dq, dk, dv, dg), dinitial))[1]

    @staticmethod
    def example(key, dtype):
        shapes = (1, 5, 1, 2), (1, 5, 1, 2), (1, 5, 1, 3), (1, 5, 1, 2), (1, 1, 2, 3)
        q, k, v, g, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 5), shapes, strict=True))
        return q, k, v, -jnp.abs(g), initial, jnp.array([[0, 0, 1, 1, 2]]), 0.7, Chunks(2, 2)

    @staticmethod
    def examples(key, dtype):
        q, k, v, g, _, _, scale, chunks = GatedLinearAttentionFunction.example(key, dtype)
        return {
            "plain": (q, k, v, g, None, None, scale, chunks),
            "forgets at once": (q, k, v, 1e4 * g, None, None, scale, chunks),
            "forgets nothing": (q, k, v, 0 * g, None, None, scale, chunks),
            "no steps": (q[:, :0], k[:, :0], v[:, :0], g[:, :0], None, None, scale, chunks),
        }


def _forward(rows: Rows, initial: Any, runs: Any, scale: float, chunks: Chunks) -> tuple[jax.Array, jax.Array, Any]:
    """The output, the last state, and what backward needs of the states at the start of each span."""
    q, _, v, _ = rows
    state = first_state(initial, q, v)
    return run_chunks(_body(scale), (), rows, runs, state, sharded_as(jnp.zeros_like(v, q.dtype), v), chunks)


def _body(scale: float) -> Any:
    """A span of chunks: the state after it, and its output.

    What fades most is the least, and is added first: to the output the share of the state, then those of blocks from the largest on. In the
    gradient of the state the last step comes first, which is what the flips are for.
    """

    def body(state: jax.Array, _: Any, rows: Any, runs: Runs | None, chunk: int) -> tuple[jax.Array, jax.Array]:
        time = rows[0].shape[1]
        q, k, v, g = (padded(jnp.moveaxis(x, 1, 2), chunk) for x in rows)
        d = decays(g, runs, chunk)
        shares = []
        for level in d.levels:
            weights = pair_products(level.later(q) * jnp.exp(level.up), level.earlier(k) * jnp.exp(level.down))
            shares.append(visible(weighted_sums(weights, level.earlier(v)), level.second))
        added = einsum("bhntk,bhntv->bhnkv", by_chunk(faded(k, d.down, d.until), chunk), by_chunk(visible(v, d.until), chunk))
        until_end = by_chunk(d.up, chunk)[:, :, :, -1, :, None]
        goes_on = None if d.since is None else by_chunk(d.since, chunk)[:, :, :, -1, :, None]

        def step(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
            power, keep, more = now
            return faded(state, power, keep) + more, state

        state, states = over_chunks(step, state, (until_end, goes_on, added))
        queries = jnp.flip(by_chunk(faded(q, d.up, d.since), chunk), 3)
        out = jnp.flip(einsum("bhntk,bhnkv->bhntv", queries, states), 3).reshape(v.shape)
        out = add_shares(visible(out, d.since), shares) + (q * k).sum(-1, keepdims=True) * v
        return state, jnp.moveaxis(scale * out[:, :, :time], 2, 1)

    return body


def _step_bytes(batch: int, heads: int, features: int, values: int, chunk: int) -> int:
    """What backward holds of each step: for each level the decayed queries and keys and their sums of g, the values and the weights."""
    levels = max(chunk.bit_length() - 1, 1)
    return 4 * batch * heads * (levels * (4 * features + 2 * values) + chunk + 8 * (features + values))


def gated_linear_attention(
    q: Float[Array, "batch time heads features"],
    k: Float[Array, "batch time heads features"],
    v: Float[Array, "batch time heads values"],
    g: Float[Array, "batch time heads features"],
    *,
    scale: float | Float[Array, ""] | None = None,
    initial_state: Float[Array, "batch heads features values"] | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Any:
    """Reads out_t = scale q_tᵀ S_t from the state S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, causally, in time linear in the length.

    Args:
        q: queries.
        k: keys.
        v: values.
        g: the logarithm of the factor by which each feature of the state fades at each step, at most 0 for one that does; -inf forgets.
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

    Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023.
    """
    who = "gated_linear_attention"
    q, k, v, g, scale, initial = check_attention(who, q, k, v, scale, initial_state, by_feature={"g": g})
    keep, chunk_size = checks.flag(who, "return_state", return_state), check_chunk_size(who, chunk_size)
    batch, _, heads, features = q.shape
    runs = runs_of(check_segment_ids(who, segment_ids, q.shape[:2], "(batch, time)", q=q))
    q, scale = scaled(q, scale)
    chunks = Chunks.of(chunk_size, q.shape[1], _step_bytes(batch, heads, features, v.shape[3], chunk_size))
    out, state = GatedLinearAttentionFunction.apply(q, k, v, g, initial, runs, scale, chunks)
    return (out, state) if keep else out
