"""Rows of the benchmark: LSTM, GRU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.recurrent.gru import gru
from layers.recurrent.lstm import lstm
from layers.tools.cases.case import Case, normal

TIME, BATCH, HIDDEN = 1024, 32, 256


def _args(gates: int) -> tuple[Any, ...]:
    return (*normal((BATCH, TIME, HIDDEN), (HIDDEN, gates * HIDDEN), (HIDDEN, gates * HIDDEN)), jnp.zeros(gates * HIDDEN))


def _flax(cell_class: Callable[..., Any], bias_layer: str) -> Callable[..., Any]:
    """`flax.nnx.RNN` around a cell, as a function of its parameters."""

    def run(x: Any, input_kernel: Any, recurrent_kernel: Any, bias: Any) -> Any:
        rnn = nnx.eval_shape(lambda: nnx.RNN(cell_class(HIDDEN, HIDDEN, rngs=nnx.Rngs(0)), rngs=False))
        cell: Any = rnn.cell
        cell.dense_i.kernel.set_value(input_kernel)
        cell.dense_h.kernel.set_value(recurrent_kernel)
        getattr(cell, bias_layer).bias.set_value(bias)
        start = jnp.zeros((BATCH, HIDDEN))
        return rnn(x, initial_carry=start if bias_layer == "dense_i" else (start, start))

    return run


def _lstm_step(carry: Any, x: Any, input_kernel: Any, recurrent_kernel: Any, bias: Any) -> tuple[Any, Any]:
    c, h = carry
    i, f, g, o = jnp.split(x @ input_kernel + h @ recurrent_kernel + bias, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def _gru_step(h: Any, x: Any, input_kernel: Any, recurrent_kernel: Any, bias: Any) -> tuple[Any, Any]:
    (a_r, a_z, a_n), (u_r, u_z, u_n) = jnp.split(x @ input_kernel + bias, 3, -1), jnp.split(h @ recurrent_kernel, 3, -1)
    z, n = jax.nn.sigmoid(a_z + u_z), jnp.tanh(a_n + jax.nn.sigmoid(a_r + u_r) * u_n)
    h = (1 - z) * n + z * h
    return h, h


def _checkpointed_chunks(step: Callable[..., Any], states: int) -> Callable[..., Any]:
    """A scan of the cell in chunks of √time steps, each under `jax.checkpoint`."""

    def run(x: Any, *parameters: Any) -> Any:
        start = jnp.zeros((BATCH, HIDDEN))
        chunk = jax.checkpoint(lambda carry, xs: jax.lax.scan(lambda c, x: step(c, x, *parameters), carry, xs))
        xs = jnp.moveaxis(x, 1, 0).reshape(-1, int(TIME**0.5), *x.shape[::2])
        return jnp.moveaxis(jax.lax.scan(chunk, start if states == 1 else (start,) * states, xs)[1].reshape(TIME, BATCH, HIDDEN), 0, 1)

    return run


CASES = (
    Case(
        "lstm",
        f"LSTM, {BATCH} x {TIME} x {HIDDEN}",
        lambda: _args(4),
        _flax(nnx.OptimizedLSTMCell, "dense_h"),
        lambda *args: lstm(*args)[0],
        flops=3.0 * 2 * TIME * BATCH * 2 * HIDDEN * 4 * HIDDEN,
        others=(("checkpointed chunks", _checkpointed_chunks(_lstm_step, 2)), ("ours, save=gates", lambda *args: lstm(*args, save="gates")[0])),
    ),
    Case(
        "gru",
        f"GRU, {BATCH} x {TIME} x {HIDDEN}",
        lambda: _args(3),
        _flax(nnx.GRUCell, "dense_i"),
        lambda *args: gru(*args)[0],
        flops=3.0 * 2 * TIME * BATCH * 2 * HIDDEN * 3 * HIDDEN,
        others=(("checkpointed chunks", _checkpointed_chunks(_gru_step, 1)), ("ours, save=gates", lambda *args: gru(*args, save="gates")[0])),
    ),
)
