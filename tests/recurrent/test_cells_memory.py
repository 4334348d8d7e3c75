"""What the LSTM and the GRU keep and take, and how exact they are, against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.recurrent.gru import gru
from layers.recurrent.lstm import lstm
from tests.recurrent.cells import draw, errors, loss, results
from tests.support import saved_bytes, temp_bytes

TIME, BATCH, HIDDEN = 512, 4, 16
OUTPUTS = TIME * BATCH * HIDDEN * 4
CHUNKS = TIME // 128


def lstm_step(carry, x, w, r, b):
    c, h = carry
    i, f, g, o = jnp.split(x @ w + (h @ r + b), 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def gru_step(h, x, w, r, b):
    (a_r, a_z, a_n), (u_r, u_z, u_n) = jnp.split(x @ w + b, 3, -1), jnp.split(h @ r, 3, -1)
    z, n = jax.nn.sigmoid(a_z + u_z), jnp.tanh(a_n + jax.nn.sigmoid(a_r + u_r) * u_n)
    h = (1 - z) * n + z * h
    return h, h


def by_autodiff(name):
    def run(x, w, r, b):
        start = jnp.zeros((x.shape[0], r.shape[0]), x.dtype)
        step = lstm_step if name == "lstm" else gru_step
        carry = (start, start) if name == "lstm" else start
        return jnp.moveaxis(jax.lax.scan(lambda c, x: step(c, x, w, r, b), carry, jnp.moveaxis(x, 1, 0))[1], 0, 1)

    return run


def by_hand(name, **options):
    return lambda *args: (lstm if name == "lstm" else gru)(*args, **options)[0]


def arguments(name, dtype=jnp.float32):
    gates = (4 if name == "lstm" else 3) * HIDDEN
    shapes = (BATCH, TIME, HIDDEN), (HIDDEN, gates), (HIDDEN, gates), (gates,)
    return tuple((draw(i, s, jnp.float32) / (4 if i in (1, 2) else 1)).astype(dtype) for i, s in enumerate(shapes))


@pytest.mark.parametrize(("name", "states"), [("lstm", 2), ("gru", 1)])
def test_saved_is_the_output_and_the_states_before_each_chunk(name, states):
    starts = states * CHUNKS * OUTPUTS // TIME
    assert saved_bytes(by_hand(name), *arguments(name)) == OUTPUTS + starts
    assert saved_bytes(by_hand(name, save="gates"), *arguments(name)) == 5 * OUTPUTS + starts


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("scanned", [False, True])
def test_stack_takes_less_than_half_the_memory_of_autodiff(name, scanned):
    def gradient(layer):
        def loss_of_stack(x, w, r, b):
            if scanned:
                return loss(jax.lax.scan(lambda x, p: (layer(x, *p), None), x, jax.tree.map(lambda p: jnp.stack([p] * 4), (w, r, b)))[0])
            for _ in range(4):
                x = layer(x, w, r, b)
            return loss(x)

        return jax.grad(loss_of_stack, (0, 1, 2, 3))

    assert temp_bytes(gradient(by_hand(name)), *arguments(name)) <= 0.5 * temp_bytes(gradient(by_autodiff(name)), *arguments(name))


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_frozen_weights_have_no_gradient_products(name):
    """Two for each kernel."""
    args = arguments(name)
    products = lambda which: str(jax.make_jaxpr(jax.grad(lambda *a: loss(by_hand(name)(*a)), which))(*args)).count("dot_general")
    assert products((0, 1, 2)) - products((0,)) == 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "save"), [("lstm", "states"), ("lstm", "gates"), ("gru", "states")])
def test_error_is_not_above_that_of_autodiff(name, save, dtype):
    """Against float64: the summed error of the output and of each gradient."""
    with jax.enable_x64(True):
        args = arguments(name, dtype)
        exact = results(by_autodiff(name), *[a.astype(jnp.float64) for a in args])
        hand, auto = (errors(results(f, *args), exact) for f in (by_hand(name, save=save), by_autodiff(name)))
    assert np.all(np.array(hand) <= np.array(auto) * 1.01), (hand, auto)
