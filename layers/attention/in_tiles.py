"""Attention's rule by XLA: loops over the tiles of the scores, forward and backward.

In the names of `dot_product_attention.py`, which has the derivation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.attention.heads import merge_heads
from layers.attention.plan import Hidden, Options
from layers.attention.tile import Tile
from layers.attention.tiles import Grid
from layers.attention.weights import before_any_key, normalized, sink_weights, sums_of_products, times, weights_of
from layers.core.deferred import zero_after
from layers.core.numerics import dot, wide
from layers.core.sharding import sharded_as


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, sinks: Any, hidden: Hidden, options: Options
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """out, what rounding took from it (None in 32 bits and more), and lse."""
    grid, dtype = Grid.of(q, k, hidden, options), wide(q.dtype)

    def step(carry, tile: Tile):
        largest, total, out = carry
        vt, spoiled = tile.finite_keys(v)
        s, _ = tile.scores(tile.queries(q), tile.keys(k), bias, spoiled)
        before = tile.queries(largest)
        now = jnp.maximum(before, lax.stop_gradient(s).max(-1))
        finite = jnp.where(now == -jnp.inf, 0, now)
        p, fade = jnp.exp(s - finite[..., None]), jnp.exp(before - finite)
        mp = times(p, tile.multiplier(dtype)).astype(v.dtype)
        total = tile.put(total, merge_heads(tile.queries(total) * fade + p.sum(-1)), 0)
        part = fade[..., None] * tile.queries(out) + dot("bkgqs,bskh->bkgqh", mp, vt)
        return tile.put(largest, merge_heads(now), 0), total, tile.put(out, merge_heads(part), 0)

    largest, total = (sharded_as(jnp.broadcast_to(x, q.shape[:3]), q) for x in before_any_key(sinks, dtype))
    largest, total, out = grid.fold(step, (largest, total, sharded_as(jnp.zeros((*q.shape[:3], v.shape[3]), dtype), q)))
    out, lost = normalized(grid, out, total, q.dtype)
    lse = jnp.where(total > 0, largest + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    return out, lost, lse


def backward(saved: tuple[Any, ...], dout: jax.Array, dlse: jax.Array | None, options: Options, wants_bias: bool) -> tuple[Any, ...]:
    """dq, dk, dv, dbias and dsinks, from what `DotProductAttentionFunction` saves."""
    q, k, v, bias, sinks, hidden, out, lost, lse = saved
    grid, dtype = Grid.of(q, k, hidden, options), wide(q.dtype)
    delta = sums_of_products(grid, dout, out, lost, dtype, sinks=sinks is not None)
    delta = delta if dlse is None else delta - dlse

    def step(carry, tile: Tile):
        dq, dbias, (dk, in_dk), (dv, in_dv) = carry
        (qt, of_q), (kt, of_k), (doutt, of_dout) = tile.finite_queries(q), tile.finite_keys(k), tile.finite_queries(dout)
        (vt, of_v), (deltat, of_delta) = tile.finite_keys(v), tile.finite_queries(delta[..., None])
        p, slope = weights_of(tile, qt, kt, bias, lse, of_q + of_k + of_v + of_dout + of_delta)
        multiplier = tile.multiplier(dtype)
        dv, in_dv = tile.add_up(dv, in_dv, dot("bkgqs,bkgqh->bskh", times(p, multiplier), doutt), 1)
        dp = times(dot("bkgqh,bskh->bkgqs", doutt, vt), multiplier)
        ds = p * tile.bounded(dp - deltat)
        if wants_bias:
            dbias = tile.add_to_plane(dbias, ds)
        ds = slope * ds
        dq = tile.add(dq, merge_heads(dot("bkgqs,bskh->bkgqh", ds, kt)) * options.scale, 0)
        dk, in_dk = tile.add_up(dk, in_dk, dot("bkgqs,bkgqh->bskh", ds, qt) * options.scale, 1)
        return dq, dbias, (dk, in_dk), (dv, in_dv)

    zero = zero_after(delta)
    dq = sharded_as(jnp.full(q.shape, zero, dtype), q)
    dbias = jnp.full(bias.shape, zero, dtype) if wants_bias and bias is not None else None
    dk, dv = ((sharded_as(jnp.full(x.shape, zero, x.dtype), x), grid.start_total(x, dtype, zero, 1)) for x in (k, v))
    dq, dbias, (dk, _), (dv, _) = grid.fold(step, (dq, dbias, dk, dv), outer=1)
    dsinks = None if sinks is None else -jnp.sum(sink_weights(sinks, lse) * delta, (0, 1))
    return dq, dk, dv, dbias, dsinks
