"""The selective scan and its gradient on NVIDIA's Hopper: h_t = exp(d_t a) h_{t-1} + d_t u_t b_t, y_t = Σ_state c_t h_t + skip u_t.

A block of threads has a batch element and `LANES` features, a thread a feature with all its states in registers. Time goes by in chunks that
are copied to shared memory. Forward keeps the states before each chunk; backward takes the chunks from the last to the first, computes the states
within one again, keeps these in shared memory, and goes back through them, with

    l_t = c_t dy_t + exp(d_{t+1} a) l_{t+1},   dc_t = Σ_features h_t dy_t,   db_t = Σ_features d_t u_t l_t,   w_t = l_t exp(d_t a) h_{t-1}
    da = Σ_t d_t w_t,   du_t = d_t Σ_state b_t l_t + skip dy_t,   dd_t = Σ_state a w_t + u_t Σ_state b_t l_t

The sums over features go across threads: products of some steps fill a tile of `SUMMED` rows in shared memory, whose rows are summed at once.

In the names of `recurrent/selective_scan.py`; states lie as (batch, state, features).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.kernels.mosaic import LANES, full, load, pallas, run, shared, strided, summed_rows

CHUNK, SUMMED = 16, 64
STATES = (4, 8, 16)
"""How many states there may be: more do not fit into shared memory, and the rows of a tile are those of whole steps."""


def forward(
    u: jax.Array, rate: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, skip: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output, as u; the last state; and the states before each chunk, (batch, chunks, state, features).

    Args:
        u, rate: (batch, time, features).
        a: (state, features), float32.
        b, c: (batch, time, state), float32.
        skip: (features,), float32.
        state: before the first step, (batch, state, features), float32.
    """
    batch, time, features = u.shape
    n, chunks, lanes = a.shape[0], time // CHUNK, strided(LANES)

    def body(u_ref: Any, rate_ref: Any, a_ref: Any, b_ref: Any, c_ref: Any, skip_ref: Any, state_ref: Any, *refs: Any) -> None:
        y_ref, last_ref, starts_ref, u_tile, rate_tile, b_tile, c_tile, arrived = refs
        element, at = lax.axis_index("batch"), _features()
        rates, skip = [load(a_ref.at[j, at], lanes) for j in range(n)], load(skip_ref.at[at], lanes)

        def chunk(k: jax.Array, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            for j in range(n):
                starts_ref[element, k, j, at] = h[j]
            _bring(k, element, at, (u_ref, u_tile), (rate_ref, rate_tile), (b_ref, b_tile), (c_ref, c_tile), arrived=arrived)

            def step(t: jax.Array, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                now, d = (load(x.at[t], lanes).astype(jnp.float32) for x in (u_tile, rate_tile))
                h = tuple(jnp.exp(d * rates[j]) * h[j] + d * now * b_tile[t, j] for j in range(n))
                y = skip * now + sum(h[j] * c_tile[t, j] for j in range(n))
                y_ref[element, k * CHUNK + t, at] = y.astype(y_ref.dtype)
                return h

            h = lax.fori_loop(0, CHUNK, step, h)
            _read_by_all()
            return h

        h = lax.fori_loop(0, chunks, chunk, tuple(load(state_ref.at[element, j, at], lanes) for j in range(n)))
        for j in range(n):
            last_ref[element, j, at] = h[j]

    out = jax.ShapeDtypeStruct
    return run(
        body,
        (u, rate, a, b, c, skip, state),
        rough=u.dtype.itemsize < 4,
        grid=(features // LANES, batch),
        grid_names=("features", "batch"),
        out_type=(out(u.shape, u.dtype), out(state.shape, jnp.float32), out((batch, chunks, *state.shape[1:]), jnp.float32)),
        scratch_types=[*_tiles(u, rate, b, c), shared(arrivals=4)],
    )


def backward(
    u: jax.Array,
    rate: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    starts: jax.Array,
    dy: jax.Array,
    dlast: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients of u, rate, a, b, c and of the state before the first step, from those of the output and of the last state."""
    batch, time, features = u.shape
    n, chunks, blocks, lanes = a.shape[0], time // CHUNK, features // LANES, strided(LANES)
    together = SUMMED // (2 * n)

    def body(u_ref: Any, rate_ref: Any, a_ref: Any, b_ref: Any, c_ref: Any, skip_ref: Any, starts_ref: Any, dy_ref: Any, dlast_ref: Any, *refs: Any):
        du_ref, drate_ref, da_ref, dbc_ref, dstate_ref, u_tile, rate_tile, b_tile, c_tile, dy_tile, h_tile, products, arrived = refs
        element, block, at = lax.axis_index("batch"), lax.axis_index("features"), _features()
        rates, skip = [load(a_ref.at[j, at], lanes) for j in range(n)], load(skip_ref.at[at], lanes)

        def chunk(i: jax.Array, carry: Any) -> Any:
            k = chunks - 1 - i
            pairs = (u_ref, u_tile), (rate_ref, rate_tile), (b_ref, b_tile), (c_ref, c_tile), (dy_ref, dy_tile)
            _bring(k, element, at, *pairs, arrived=arrived)

            def again(t: jax.Array, h: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                now, d = (load(x.at[t], lanes).astype(jnp.float32) for x in (u_tile, rate_tile))
                for j in range(n):
                    h_tile[t, j] = h[j]
                return tuple(jnp.exp(d * rates[j]) * h[j] + d * now * b_tile[t, j] for j in range(n))

            lax.fori_loop(0, CHUNK, again, tuple(load(starts_ref.at[element, k, j, at], lanes) for j in range(n)))

            def back(i: jax.Array, carry: Any) -> Any:
                dh, da = map(list, carry)
                first = CHUNK - (i + 1) * together
                for r in reversed(range(together)):
                    t = first + r
                    now, d, dout = (load(x.at[t], lanes).astype(jnp.float32) for x in (u_tile, rate_tile, dy_tile))
                    into_u = into_rate = jnp.zeros_like(d)
                    for j in range(n):
                        before, fade = load(h_tile.at[t, j], lanes), jnp.exp(d * rates[j])
                        dh[j] = dh[j] + dout * c_tile[t, j]
                        products[r * 2 * n + j] = dh[j] * d * now
                        products[r * 2 * n + n + j] = dout * (fade * before + d * now * b_tile[t, j])
                        inner = dh[j] * before * fade
                        into_u, into_rate = into_u + dh[j] * b_tile[t, j], into_rate + inner * rates[j]
                        da[j] = da[j] + inner * d
                        dh[j] = dh[j] * fade
                    du_ref[element, k * CHUNK + t, at] = (into_u * d + skip * dout).astype(du_ref.dtype)
                    drate_ref[element, k * CHUNK + t, at] = (into_rate + into_u * now).astype(drate_ref.dtype)
                dbc_ref[block, element, pallas().ds((k * CHUNK + first) * 2 * n, SUMMED)] = summed_rows(products)
                return tuple(dh), tuple(da)

            carry = lax.fori_loop(0, CHUNK // together, back, carry)
            _read_by_all()
            return carry

        carry = tuple(load(dlast_ref.at[element, j, at], lanes) for j in range(n)), (full(LANES, 0.0, lanes),) * n
        dh, da = lax.fori_loop(0, chunks, chunk, carry)
        for j in range(n):
            da_ref[element, j, at] = da[j]
            dstate_ref[element, j, at] = dh[j]

    out, of_states = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((batch, n, features), jnp.float32)
    du, drate, da, dbc, dstate = run(
        body,
        (u, rate, a, b, c, skip, starts, dy, dlast),
        rough=u.dtype.itemsize < 4,
        grid=(blocks, batch),
        grid_names=("features", "batch"),
        out_type=(out(u.shape, u.dtype), out(u.shape, rate.dtype), of_states, out((blocks, batch, time * 2 * n), jnp.float32), of_states),
        scratch_types=[*_tiles(u, rate, b, c, dy), shared((CHUNK, n, LANES)), shared((SUMMED, LANES)), shared(arrivals=5)],
    )
    db, dc = jnp.moveaxis(dbc.sum(0).reshape(batch, time, 2, n), 2, 0)
    return du, drate, da.sum(0), db, dc, dstate


def _features() -> Any:
    """Those of a block."""
    return pallas().ds(lax.axis_index("features") * LANES, LANES)


def _tiles(*arrays: jax.Array) -> list[Any]:
    """Shared memory for a chunk of each."""
    return [shared((CHUNK, min(x.shape[2], LANES)), x.dtype) for x in arrays]


def _bring(k: jax.Array, element: jax.Array, at: Any, *pairs: tuple[Any, Any], arrived: Any) -> None:
    """Copies chunk k of arrays (batch, time, ...) to shared memory, and waits until all are there."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    steps = pallas().ds(k * CHUNK, CHUNK)
    for whole, tile in pairs:
        plgpu.copy_gmem_to_smem(whole.at[element, steps, at] if tile.shape[1] == LANES else whole.at[element, steps], tile, arrived)
    plgpu.barrier_wait(arrived)


def _read_by_all() -> None:
    """All threads have read a chunk before the next one is copied over it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.commit_smem()
