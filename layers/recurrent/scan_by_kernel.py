"""The selective scan by a kernel, with the derivatives of what XLA computes.

A kernel takes the final step sizes, in float32 where bias and softplus make them, and gives the gradients of those; what bias and softplus do to
them, and the gradient of D, Σ u_t dy_t, is computed here. In the names of `selective_scan.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.compat import varies
from layers.core.numerics import wide
from layers.core.products import einsum
from layers.core.sharding import mesh_of
from layers.core.stand_in import stand_in
from layers.kernels.mosaic_selective_scan import CHUNK
from layers.kernels.selective_scan import KERNELS, ScanCall
from layers.recurrent.recurrence import run

Arrays = tuple[jax.Array, ...]


def describe(x: Any, resets: Any) -> ScanCall:
    """What a kernel is told of a call, of these `Inputs`."""
    arrays = [v for v in x if v is not None]
    return ScanCall(x.u.shape, str(x.u.dtype), x.a.shape[1], x.z is not None, resets is not None, varies(arrays), mesh_of(*arrays))


def forward(x: Any, a: jax.Array, first: jax.Array, softplus: bool, implementation: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output, the last state as (batch, features, state), and the states before each chunk of the kernel.

    Args:
        x: the `Inputs`.
        a: A as (state, features).
        first: the state before the first step, (batch, state, features).
        softplus: whether step sizes are softplus(delta + bias).
        implementation: the name of the kernel.
    """
    y, last, starts = stand_in(KERNELS[implementation].forward, _by_xla, (*_operands(x, a, _raw(x), softplus), first))
    return y, jnp.swapaxes(last, 1, 2), starts


def backward(x: Any, a: jax.Array, starts: jax.Array, dout: jax.Array, dlast: jax.Array, softplus: bool, implementation: str) -> Any:
    """The gradients of the `Inputs`, in a tuple like them."""
    raw = _raw(x)
    operands = _operands(x, a, raw, softplus)
    dlast = jnp.swapaxes(dlast, 1, 2).astype(a.dtype)
    du, drate, da, db, dc, dstate = stand_in(KERNELS[implementation].backward, _back_by_xla, (*operands, starts, dout, dlast))
    ddelta = drate * jax.nn.sigmoid(raw) if softplus else drate
    dd = None if x.d is None else einsum("btd,btd->d", x.u.astype(a.dtype), dout.astype(a.dtype))
    dbias = None if x.bias is None else ddelta.sum((0, 1))
    return type(x)(du, ddelta, da.T, db, dc, dd, None, dbias, None if x.initial is None else jnp.swapaxes(dstate, 1, 2))


def _raw(x: Any) -> jax.Array:
    return x.delta if x.bias is None else x.delta.astype(jnp.float32) + x.bias.astype(jnp.float32)


def _operands(x: Any, a: jax.Array, raw: jax.Array, softplus: bool) -> Arrays:
    """Those of the kernel before the states: u, the step sizes, A, B, C and D."""
    rate = jax.nn.softplus(raw.astype(jnp.float32)) if softplus else raw
    skip = jnp.zeros(a.shape[1:], jnp.float32) if x.d is None else x.d.astype(jnp.float32)
    return x.u, rate, a, x.b.astype(jnp.float32), x.c.astype(jnp.float32), skip


def _by_xla(u: Any, rate: Any, a: Any, b: Any, c: Any, skip: Any, state: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the kernel computes, chunk by chunk; backward computes the states of a chunk again."""

    @jax.checkpoint
    def chunk(state: jax.Array, rows: Arrays) -> tuple[jax.Array, Any]:
        now, d, b, c = rows
        h = run(jnp.exp(d[:, :, None] * a), (d * now)[:, :, None] * b[..., None], state, None)
        return h[-1], ((h * c[..., None]).sum(2) + skip * now, state)

    chunks = lambda x: jnp.moveaxis(x.astype(wide(x.dtype)), 1, 0).reshape(-1, CHUNK, x.shape[0], x.shape[2])
    last, (y, starts) = lax.scan(chunk, state, tuple(map(chunks, (u, rate, b, c))))
    return jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, 1).astype(u.dtype), last, jnp.moveaxis(starts, 0, 1)


def _back_by_xla(*operands: Any) -> Arrays:
    u, rate, a, b, c, skip, starts, dout, dlast = operands
    run_it = lambda u, rate, a, b, c, state: _by_xla(u, rate, a, b, c, skip, state)[:2]
    return jax.vjp(run_it, u, rate, a, b, c, starts[:, 0])[1]((dout, dlast))
