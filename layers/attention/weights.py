"""The parts of attention's rule beside its loops over tiles: sinks, the weights of a tile, the output and what rounding takes from it.

In the names of `dot_product_attention.py`, which has the derivation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.attention.tile import Tile
from layers.attention.tiles import Grid
from layers.core.numerics import product, safe_reciprocal
from layers.core.sharding import sharded_as


def before_any_key(sinks: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The largest score and the sum of exp(s - largest) of a query that has seen the sink only.

    What is subtracted changes no output, so second derivatives hold it fixed: where XLA computes a score twice and rounds it differently, the
    derivative of a maximum is 0 / 0.
    """
    if sinks is None:
        return jnp.full((), -jnp.inf, dtype), jnp.zeros((), dtype)
    sinks = _finite_above(sinks, dtype)
    largest = lax.stop_gradient(sinks)
    return largest, jnp.exp(sinks - jnp.where(largest == -jnp.inf, 0, largest))


def _finite_above(sinks: jax.Array, dtype: Any) -> jax.Array:
    return jnp.minimum(sinks.astype(dtype), jnp.finfo(dtype).max / 2)


def normalized(grid: Grid, out: jax.Array, total: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The output, and what rounding takes from it."""
    if out.dtype == dtype:
        return out * safe_reciprocal(total)[..., None], None

    def step(carry, tile: Tile):
        exact = tile.take(out, 0) * safe_reciprocal(tile.take(total, 0))[..., None]
        rounded = exact.astype(dtype)
        return tile.put(carry[0], rounded, 0), tile.put(carry[1], exact - rounded, 0)

    zeros = sharded_as(jnp.zeros(out.shape, dtype), out)
    return grid.fold_queries(step, (zeros, zeros))


def sums_of_products(grid: Grid, dout: jax.Array, out: jax.Array, lost: jax.Array | None, dtype: Any, *, sinks: bool) -> jax.Array:
    """The sum, for each query, of its output times its gradient: in blocks, since XLA on the CPU would first convert all of both to float32.

    `sinks` sum it up over queries: there the gradient of one that is hidden, whose output is 0, must not be touched.
    """
    times_output = product if sinks and grid.hides else jnp.multiply
    if out.dtype == dtype:
        return jnp.sum(times_output(out, dout), -1)

    def step(delta, tile: Tile):
        exact = exact_output(tile.take(out, 0), None if lost is None else tile.take(lost, 0), dtype)
        return tile.put(delta, jnp.sum(times_output(exact, tile.take(dout, 0).astype(dtype)), -1), 0)

    return grid.fold_queries(step, sharded_as(jnp.zeros(out.shape[:-1], dtype), out))


def exact_output(out: jax.Array, lost: jax.Array | None, dtype: Any) -> jax.Array:
    """The output before it was rounded: where the weights are peaked, delta and dp nearly cancel, and its rounding would be all that is left."""
    return out.astype(dtype) if lost is None else out.astype(dtype) + lost.astype(dtype)


def times(x: jax.Array, multiplier: jax.Array | None) -> jax.Array:
    return x if multiplier is None else x * multiplier


def weights_of(tile: Tile, q: jax.Array, k: jax.Array, bias: Any, lse: jax.Array, spoiled: Any) -> tuple[jax.Array, Any]:
    """The tile of p, and the derivative of its scores by the scaled products.

    A huge score computed again may be rounded in another way: it is not above its logsumexp.
    """
    lse = tile.queries(lse)[..., None]
    s, slope = tile.scores(q, k, bias, spoiled + jnp.where(jnp.isnan(lse), jnp.nan, 0))
    return jnp.exp(jnp.minimum(s - jnp.where(jnp.isfinite(lse), lse, 0), 0)), slope


def sink_weights(sinks: jax.Array, lse: jax.Array) -> jax.Array:
    return jnp.exp(_finite_above(sinks, lse.dtype) - jnp.where(lse == -jnp.inf, jnp.inf, lse))
