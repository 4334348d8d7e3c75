"""Linear attention whose state fades by a factor of its own for each feature, in chunks of matrix products.

    S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,   out_t = scale q_tᵀ S_t

Within a chunk that starts from the state S,

    out_i = scale (q_i exp(Σ_{t≤i} g_t))ᵀ S + scale Σ_{j≤i} w_ij v_j,   w_ij = Σ_feature q_i k_j exp(Σ_{j<t≤i} g_t)

The pairs j < i are taken by halves: a block of 2 m steps is two of m, and for i in the second half and j in the first

    w_ij = (q_i exp(up_i))ᵀ (k_j exp(down_j)),   up_i = Σ g_t from the second half's start to i,   down_j = Σ g_t from j + 1 to the first one's end

a product of two matrices. The blocks of 1, 2, 4, ... steps have every pair once. All exponents are sums of some g_t, never differences of
sums, so none is positive where g is not, and a g of -50 or -inf beside small ones costs no digits and no derivative.

Backward takes the chunks from the last to the first, computes each again from the state it starts from, and pulls dout and the gradient of
the state after it back through it:

    dS_start, dq, dk, dv, dg = pull of the chunk (dS_end, dout)

Saved: q, k, v, g (arguments) and the state at the start of each chunk.

Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023; the halving is that of the parallel
prefix sum, Blelloch, "Prefix Sums and Their Applications", 1990.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core.checks import check_floating
from layers.core.function import Function
from layers.core.numerics import scaled, wide
from layers.core.products import einsum
from layers.core.recompute import barrier
from layers.core.zeros import lie_like
from layers.recurrent.loops import cut, fold_chunks, put

Rows = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class GatedLinearAttentionFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, g, initial, scale, chunk):
        out, last, starts = _forward((q, k, v, g), initial, scale, chunk)
        ctx.save_for_backward((q, k, v, g), initial, starts)
        ctx.scale, ctx.chunk = scale, chunk
        return out, last

    @staticmethod
    def backward(ctx, dout, dlast):
        (rows, initial, starts), (dout, dlast) = barrier(ctx.saved_tensors, (dout, dlast))

        def step(carry, start, size, state):
            dstate, buffers = carry
            pull = jax.vjp(lambda s, *r: _chunk(s, r, ctx.scale), state, *_cut(rows, start, size, state.dtype))[1]
            dstate, *grads = pull((dstate, _heads_first(cut(dout, start, size, state.dtype))))
            return (dstate, [put(into, _time_first(x), start) for into, x in zip(buffers, grads, strict=True)]), None

        carry = (dlast, [lie_like(jnp.zeros_like(x), x) for x in rows])
        (dinitial, grads), _ = fold_chunks(step, carry, dout.shape[1], ctx.chunk, starts, reverse=True, beside=(rows, dout))
        return *grads, None if initial is None else dinitial, None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, dg, dinitial, _scale, _chunk):
        rows, initial, _ = ctx.saved_tensors
        run = lambda rows, initial: _forward(rows, initial, ctx.scale, ctx.chunk)[:2]
        return jax.jvp(run, (rows, initial), ((dq, dk, dv, dg), dinitial))[1]

    @staticmethod
    def example(key, dtype):
        shapes = (1, 5, 1, 2), (1, 5, 1, 2), (1, 5, 1, 3), (1, 5, 1, 2), (1, 1, 2, 3)
        q, k, v, g, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 5), shapes, strict=True))
        return q, k, v, -jnp.abs(g), initial, 0.7, 2


def _heads_first(x: jax.Array) -> jax.Array:
    """(time, batch, heads, ...) as (batch, heads, time, ...)."""
    return jnp.moveaxis(x, 0, 2)


def _time_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 2, 0)


def _cut(rows: Rows, start: Any, size: int, dtype: Any) -> Any:
    return tuple(_heads_first(cut(x, start, size, dtype)) for x in rows)


def _forward(rows: Rows, initial: Any, scale: float, chunk: int) -> tuple[jax.Array, jax.Array, Any]:
    """The output, the last state, and the state at the start of each chunk."""
    q, _, v, _ = rows
    dtype = wide(q.dtype)

    def step(carry, start, size, _):
        state, out = carry
        after, y = _chunk(state, _cut(rows, start, size, dtype), scale)
        return (after, put(out, _time_first(y), start)), state

    batch, length, heads, features = q.shape
    state = lie_like(jnp.zeros((batch, heads, features, v.shape[3]), dtype), q[:, 0]) if initial is None else initial.astype(dtype)
    carry = (state, lie_like(jnp.zeros_like(v, q.dtype), v))
    (state, out), starts = fold_chunks(step, carry, length, chunk, beside=(rows, state))
    return out, state, starts


def _chunk(state: jax.Array, rows: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk of (batch, heads, time, features), and its output.

    What fades most is the least, and is added first: to the output the share of the state, then those of blocks from the largest on. In the
    gradient of the state the last step comes first, which is what the flips are for.
    """
    size = rows[0].shape[2]
    padded = 1 << (size - 1).bit_length()
    q, k, v, g = (jnp.pad(x, ((0, 0), (0, 0), (0, padded - size), (0, 0))) for x in rows)
    shares, up, down, half = [], g, jnp.zeros_like(g), 1
    while half < padded:
        (_, q2), (k1, _), (v1, _), (up1, up2), (down1, down2) = (_halves(x, half) for x in (q, k, v, up, down))
        weights = einsum("bhnik,bhnjk->bhnij", q2 * jnp.exp(up2), k1 * jnp.exp(down1))
        shares.append(einsum("bhnij,bhnjv->bhniv", weights, v1))
        up, down = _whole(up1, up2 + up1[..., -1:, :]), _whole(down1 + up2[..., -1:, :], down2)
        half *= 2
    out = jnp.flip(einsum("bhtk,bhkv->bhtv", jnp.flip(q * jnp.exp(up), 2), state), 2)
    while shares:
        share = shares.pop()
        out1, out2 = _halves(out, share.shape[3])
        out = _whole(out1, out2 + share)
    out = out + (q * k).sum(-1, keepdims=True) * v
    fade = jnp.exp(up[..., -1, :])[..., None]
    state = fade * state + einsum("bhtk,bhtv->bhkv", k * jnp.exp(down), v)
    return state, scale * out[:, :, :size]


def _halves(x: jax.Array, half: int) -> jax.Array:
    """(batch, heads, time, ...) as the first and the second halves of its blocks of 2 `half` steps, (2, batch, heads, blocks, half, ...)."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, 2, half, x.shape[-1]), 3, 0)


def _whole(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `_halves`."""
    return jnp.stack([first, second], 3).reshape(*first.shape[:2], -1, first.shape[-1])


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
        chunk_size: steps between two states that are kept, a power of 2.

    Returns:
        An array of the shape of `v` and the dtype of `q`; with `return_state` also the last state, of float32 or wider.

    Raises:
        ValueError: where shapes do not fit, or `chunk_size` is no power of 2.
        TypeError: where an argument is not of a real floating-point dtype.

    Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023.
    """
    q, k, v, g = (jnp.asarray(x) for x in (q, k, v, g))
    initial = None if initial_state is None else jnp.asarray(initial_state)
    _check(q, k, v, g, initial, chunk_size)
    q, scale = scaled(q, scale)
    out, state = GatedLinearAttentionFunction.apply(q, k, v, g, initial, scale, chunk_size)
    return (out, state) if return_state else out


def _check(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, initial: Any, chunk_size: int) -> None:
    name = "gated_linear_attention"
    check_floating(name, q=q, k=k, v=v, g=g, initial_state=initial)
    if q.ndim != 4:
        raise ValueError(f"{name}: q has shape {q.shape}, but must be (batch, time, heads, features); use jax.vmap for further axes")
    batch, _, heads, features = q.shape
    for key, x in {"k": k, "g": g}.items():
        if x.shape != q.shape:
            raise ValueError(f"{name}: {key} has shape {x.shape}, but must have that of q, {q.shape}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"{name}: v has shape {v.shape}, but must have that of q but for the last axis (q: {q.shape})")
    if initial is not None and initial.shape != (batch, heads, features, v.shape[3]):
        raise ValueError(f"{name}: initial_state has shape {initial.shape}, but must have shape {(batch, heads, features, v.shape[3])}")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{name}: chunk_size is {chunk_size}, but must be a power of 2: the halves of a chunk are halved again")
