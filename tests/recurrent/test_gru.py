"""The GRU against its definition in a loop, Flax, PyTorch and finite differences; padding, dtypes, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.checking.gradcheck import gradcheck
from layers.recurrent.gru import GRU, gru
from layers.recurrent.rnn import RNN
from tests.recurrent.cells import draw, loss, module_results, quick_compilation, results, short_chunks
from tests.support import assert_trees_close, jit_grad, torch_reference

__all__ = ["quick_compilation"]

FEATURES, HIDDEN = 3, 4


def arguments(batch=(2,), time=7, dtype=jnp.float64):
    wide = 3 * HIDDEN
    shapes = (*batch, time, FEATURES), (FEATURES, wide), (HIDDEN, wide), (wide,), (wide,), (*batch, HIDDEN)
    return tuple(draw(i, s, dtype) for i, s in enumerate(shapes))


def ours(x, w, r, b, rb, h, **options):
    return gru(x, w, r, b, rb, initial_carry=h, **options)


def loop(x, w, r, b, rb, h, lengths=None, reverse=False):
    """The definition, step by step, where a step outside its sequence changes nothing."""
    ys = [None] * x.shape[-2]
    for t in reversed(range(len(ys))) if reverse else range(len(ys)):
        (a_r, a_z, a_n), (u_r, u_z, u_n) = jnp.split(x[..., t, :] @ w + b, 3, -1), jnp.split(h @ r + rb, 3, -1)
        z, n = jax.nn.sigmoid(a_z + u_z), jnp.tanh(a_n + jax.nn.sigmoid(a_r + u_r) * u_n)
        keep = True if lengths is None else (t < lengths)[..., None]
        h = jnp.where(keep, (1 - z) * n + z * h, h)
        ys[t] = h
    return jnp.stack(ys, -2), h


@pytest.mark.parametrize(("save", "steps", "reverse"), [("states", 2, True), ("states", 64, False), ("gates", 2, False)])
def test_values_and_gradients_are_those_of_the_loop(save, steps, reverse, monkeypatch):
    short_chunks(monkeypatch, steps)
    with jax.enable_x64(True):
        args, lengths = arguments((3,)), jnp.array([7, 0, 4])
        got = results(partial(ours, save=save, reverse=reverse, seq_lengths=lengths), *args)
        assert_trees_close(got, results(partial(loop, reverse=reverse, lengths=lengths), *args), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"time_major": True, "reverse": True, "keep_order": True}], ids=str)
def test_rnn_has_the_values_and_gradients_of_flax(options):
    with jax.enable_x64(True):
        make = lambda rnn: rnn(nnx.GRUCell(FEATURES, HIDDEN, param_dtype=jnp.float64, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1)))
        x = draw(2, (5, 6, FEATURES))
        got, expected = (module_results(make(rnn), x, return_carry=True, **options) for rnn in (RNN, nnx.RNN))
        assert_trees_close(got, expected, rtol=1e-10, atol=1e-12)


def test_bidirectional_is_that_of_flax():
    with jax.enable_x64(True):
        x = draw(2, (2, 5, FEATURES))
        cell = lambda seed: nnx.GRUCell(FEATURES, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        theirs = nnx.Bidirectional(nnx.RNN(cell(1)), nnx.RNN(cell(2)))
        make = lambda seed: GRU(FEATURES, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        both = nnx.Bidirectional(make(1), make(2))
        assert_trees_close(module_results(both, x), module_results(theirs, x), rtol=1e-10, atol=1e-12)


def test_state_of_the_flax_module_loads():
    theirs = nnx.RNN(nnx.GRUCell(FEATURES, HIDDEN, rngs=nnx.Rngs(1)))
    module = GRU(FEATURES, HIDDEN, rngs=nnx.Rngs(2))
    nnx.update(module, nnx.state(theirs))
    x = draw(1, (2, 5, FEATURES), jnp.float32)
    np.testing.assert_allclose(module(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        gradcheck(partial(ours, seq_lengths=jnp.array([4, 2])), arguments(time=4))


def test_torch_computes_the_same():
    r = torch_reference("gru")
    differentiated = ("x", "input_kernel", "recurrent_kernel", "bias", "recurrent_bias", "h")
    with jax.enable_x64(True):
        out, pull = jax.vjp(jax.jit(ours), *[r[name] for name in differentiated])
        assert_trees_close(out, (r["y"], r["last_h"]), rtol=1e-10, atol=1e-12)
        assert_trees_close(pull(jax.tree.map(jnp.cos, out)), tuple(r[f"d_{name}"] for name in differentiated), rtol=1e-10, atol=1e-12)


def test_forward_mode_and_second_derivatives_are_those_of_the_loop(monkeypatch):
    short_chunks(monkeypatch, 2)
    with jax.enable_x64(True):
        args, lengths = arguments(time=5), jnp.array([5, 3])
        tangents = tuple(draw(10 + i, a.shape) for i, a in enumerate(args))

        def both(fn):
            f = lambda *a: loss(fn(*a))
            return jax.jit(lambda: (jax.jvp(f, args, tangents), jax.jvp(jax.grad(f, (0, 1, 2, 5)), args, tangents)[1]))()

        assert_trees_close(both(partial(ours, seq_lengths=lengths)), both(partial(loop, lengths=lengths)), rtol=1e-9, atol=1e-10)


def test_nothing_in_the_padding_reaches_a_gradient():
    x, *rest = arguments(dtype=jnp.float32)
    lengths = jnp.array([4, 0])
    padded = jnp.where((jnp.arange(7) < lengths[:, None])[..., None], x, jnp.nan)
    out, grads = results(partial(ours, seq_lengths=lengths), padded, *rest)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((out, grads)))
    np.testing.assert_array_equal(grads[0][0, 4:], 0)
    np.testing.assert_array_equal(out[1][1], rest[-1][1])


def test_nothing_in_the_padding_reaches_a_tangent():
    x, *rest = arguments(dtype=jnp.float32)
    lengths = jnp.array([4, 0])
    padded = jnp.where((jnp.arange(7) < lengths[:, None])[..., None], x, jnp.nan)
    push = jax.jit(lambda x: jax.jvp(lambda x: ours(x, *rest, seq_lengths=lengths), (x,), (x,)))
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(push(padded)))


@pytest.mark.parametrize("shape", [(2, 0, FEATURES), (0, 3, FEATURES)])
def test_no_time_and_no_batch_have_zero_gradients(shape):
    _, w, r, b, *_ = arguments(dtype=jnp.float32)
    assert gru(jnp.zeros(shape), w, r, b)[0].shape == (*shape[:2], HIDDEN)
    assert all(not g.any() for g in jit_grad(lambda *a: loss(gru(*a)), (0, 1, 2, 3))(jnp.zeros(shape), w, r, b))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes_are_those_of_flax(dtype):
    make = lambda rnn: rnn(nnx.GRUCell(FEATURES, HIDDEN, dtype=dtype, rngs=nnx.Rngs(1)))
    x = draw(1, (2, 5, FEATURES), jnp.bfloat16)
    y, y_flax = (make(rnn)(x) for rnn in (RNN, nnx.RNN))
    assert y.dtype == y_flax.dtype
    np.testing.assert_allclose(y, y_flax, rtol=0.1 if dtype else 1e-5, atol=0.03 if dtype else 1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recurrent_kernel": jnp.ones((4, 16))}, ValueError, r"gru: recurrent_kernel has shape \(4, 16\), but must be \(hidden, 3 \* hidden\)"),
        ({"recurrent_bias": jnp.ones(4)}, ValueError, r"gru: recurrent_bias has shape \(4,\)"),
        ({"initial_carry": jnp.ones((3, 4))}, ValueError, r"gru: initial_carry has shape \(3, 4\), but must be \(\*batch, hidden\)"),
        ({"input_kernel": jnp.ones((3, 12), int)}, TypeError, "gru: input_kernel is of dtype int"),
    ],
)
def test_wrong_arguments_are_explained(changes, error, message):
    given = {"x": jnp.ones((2, 5, 3)), "input_kernel": jnp.ones((3, 12)), "recurrent_kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)}
    with pytest.raises(error, match=message):
        gru(**(given | changes))
