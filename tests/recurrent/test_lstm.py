"""The LSTM against its definition in a loop, Flax, PyTorch and finite differences; padding, dtypes, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from layers.checking.gradcheck import gradcheck
from layers.recurrent.lstm import LSTM, lstm
from layers.recurrent.rnn import RNN
from layers.recurrent.whole_sequences import WholeSequences
from tests.recurrent.cells import draw, loss, module_results, quick_compilation, results, short_chunks
from tests.support import assert_trees_close, jit_grad, torch_reference

__all__ = ["quick_compilation"]

FEATURES, HIDDEN = 3, 4


def arguments(batch=(2,), time=7, dtype=jnp.float64):
    shapes = (*batch, time, FEATURES), (FEATURES, 4 * HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN,), (*batch, HIDDEN), (*batch, HIDDEN)
    return tuple(draw(i, s, dtype) for i, s in enumerate(shapes))


def ours(x, w, r, b, c, h, **options):
    return lstm(x, w, r, b, initial_carry=(c, h), **options)


def loop(x, w, r, b, c, h, lengths=None, reverse=False):
    """The definition, step by step, where a step outside its sequence changes nothing."""
    ys = [None] * x.shape[-2]
    for t in reversed(range(len(ys))) if reverse else range(len(ys)):
        a = x[..., t, :] @ w + h @ r + b
        i, f, g, o = (fn(part) for fn, part in zip((jax.nn.sigmoid, jax.nn.sigmoid, jnp.tanh, jax.nn.sigmoid), jnp.split(a, 4, -1), strict=True))
        new_c = f * c + i * g
        new_h = o * jnp.tanh(new_c)
        keep = True if lengths is None else (t < lengths)[..., None]
        c, h = jnp.where(keep, new_c, c), jnp.where(keep, new_h, h)
        ys[t] = h
    return jnp.stack(ys, -2), (c, h)


# Values and gradients


@pytest.mark.parametrize(("save", "steps", "reverse"), [("states", 2, True), ("states", 64, False), ("gates", 2, False)])
def test_values_and_gradients_are_those_of_the_loop(save, steps, reverse, monkeypatch):
    short_chunks(monkeypatch, steps)
    with jax.enable_x64(True):
        args, lengths = arguments((3,)), jnp.array([7, 0, 4])
        got = results(partial(ours, save=save, reverse=reverse, seq_lengths=lengths), *args)
        assert_trees_close(got, results(partial(loop, reverse=reverse, lengths=lengths), *args), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (nnx.OptimizedLSTMCell, {"time_major": True}),
        (nnx.OptimizedLSTMCell, {"reverse": True}),
        (nnx.LSTMCell, {"reverse": True, "keep_order": True}),
    ],
    ids=str,
)
def test_rnn_has_the_values_and_gradients_of_flax(cell, options):
    with jax.enable_x64(True):
        make = lambda rnn: rnn(cell(FEATURES, HIDDEN, param_dtype=jnp.float64, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1)))
        x = draw(2, (5, 6, FEATURES))
        got, expected = (module_results(make(rnn), x, return_carry=True, **options) for rnn in (RNN, nnx.RNN))
        assert_trees_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reverse": True, "keep_order": True}], ids=str)
def test_sequence_lengths_are_those_of_flax_outside_the_padding(options):
    with jax.enable_x64(True):
        x, start, lengths = draw(2, (3, 6, FEATURES)), (draw(3, (3, HIDDEN)),) * 2, jnp.array([6, 1, 4])
        real = (jnp.arange(6) < lengths[:, None])[..., None]

        def outputs(rnn, x, start):
            cell = nnx.OptimizedLSTMCell(FEATURES, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
            carry, y = rnn(cell)(x, initial_carry=start, seq_lengths=lengths, return_carry=True, **options)
            return carry, jnp.where(real, y, 0)

        got, expected = (results(partial(outputs, rnn), x, start) for rnn in (RNN, nnx.RNN))
        assert_trees_close(got, expected, rtol=1e-10, atol=1e-12)


def test_bidirectional_is_that_of_flax():
    with jax.enable_x64(True):
        x = draw(2, (2, 5, FEATURES))
        cell = lambda seed: nnx.OptimizedLSTMCell(FEATURES, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        theirs = nnx.Bidirectional(nnx.RNN(cell(1)), nnx.RNN(cell(2)))
        make = lambda seed: LSTM(FEATURES, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        both = nnx.Bidirectional(make(1), make(2))
        assert_trees_close(module_results(both, x), module_results(theirs, x), rtol=1e-10, atol=1e-12)


def test_state_of_the_flax_module_loads():
    theirs = nnx.RNN(nnx.OptimizedLSTMCell(FEATURES, HIDDEN, rngs=nnx.Rngs(1)))
    module = LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(2))
    nnx.update(module, nnx.state(theirs))
    x = draw(1, (2, 5, FEATURES), jnp.float32)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(module))) == jax.tree.structure(nnx.to_pure_dict(nnx.state(theirs)))
    np.testing.assert_allclose(module(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_initial_parameters_are_those_of_flax():
    theirs = nnx.RNN(nnx.OptimizedLSTMCell(FEATURES, HIDDEN, rngs=nnx.Rngs(1)))
    ours = LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(1))
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(nnx.state(theirs, nnx.Param)), rtol=0)


def test_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        gradcheck(partial(ours, seq_lengths=jnp.array([4, 2])), arguments(time=4))


def test_torch_computes_the_same():
    r = torch_reference("lstm")
    differentiated = ("x", "input_kernel", "recurrent_kernel", "bias", "c", "h")
    with jax.enable_x64(True):
        run = lambda x, w, k, b, c, h: ours(x, w, k, b + r["recurrent_bias"], c, h)  # of two biases that are added PyTorch keeps both
        out, pull = jax.vjp(jax.jit(run), *[r[name] for name in differentiated])
        assert_trees_close(out, (r["y"], (r["last_c"], r["last_h"])), rtol=1e-10, atol=1e-12)
        assert_trees_close(pull(jax.tree.map(jnp.cos, out)), tuple(r[f"d_{name}"] for name in differentiated), rtol=1e-10, atol=1e-12)


def test_forward_mode_and_second_derivatives_are_those_of_the_loop(monkeypatch):
    short_chunks(monkeypatch, 2)
    with jax.enable_x64(True):
        args, lengths = arguments(time=5), jnp.array([5, 3])
        tangents = tuple(draw(10 + i, a.shape) for i, a in enumerate(args))

        def both(fn):
            f = lambda *a: loss(fn(*a))
            push = lambda: (jax.jvp(f, args, tangents), jax.jvp(jax.grad(f, (0, 1, 2, 4)), args, tangents)[1])
            return jax.jit(push)()

        assert_trees_close(both(partial(ours, seq_lengths=lengths)), both(partial(loop, lengths=lengths)), rtol=1e-9, atol=1e-10)


def test_batch_axes_go_anywhere():
    with jax.enable_x64(True):
        x, w, r, b, c, h = arguments((2, 3), time=4)
        y, (c_last, h_last) = ours(x, w, r, b, c, h, seq_lengths=jnp.array([[4, 1, 0], [2, 3, 4]]))
        one, (c_one, h_one) = ours(x[1, 0], w, r, b, c[1, 0], h[1, 0], seq_lengths=jnp.array(2))
        np.testing.assert_allclose(y[1, 0], one, rtol=1e-12)
        np.testing.assert_allclose((c_last[1, 0], h_last[1, 0]), (c_one, h_one), rtol=1e-12)
        assert y.shape == (2, 3, 4, HIDDEN)


# Padding and edges


def test_nothing_in_the_padding_reaches_a_gradient():
    x, w, r, b, c, h = arguments(dtype=jnp.float32)
    lengths = jnp.array([4, 0])
    padded = jnp.where((jnp.arange(7) < lengths[:, None])[..., None], x, jnp.nan)
    run = lambda x: results(partial(ours, seq_lengths=lengths), x, w, r, b, c, h)
    out, grads = run(padded)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((out, grads)))
    np.testing.assert_array_equal(grads[0][0, 4:], 0)
    np.testing.assert_array_equal(grads[0][1], 0)


def test_nothing_in_the_padding_reaches_a_tangent():
    x, w, r, b, c, h = arguments(dtype=jnp.float32)
    lengths = jnp.array([4, 0])
    padded = jnp.where((jnp.arange(7) < lengths[:, None])[..., None], x, jnp.nan)
    push = jax.jit(lambda x: jax.jvp(lambda x: ours(x, w, r, b, c, h, seq_lengths=lengths), (x,), (x,)))
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(push(padded)))


def test_length_zero_returns_the_initial_carry():
    x, w, r, b, c, h = arguments(dtype=jnp.float32)
    y, (c_last, h_last) = ours(x, w, r, b, c, h, seq_lengths=jnp.array([0, 7]))
    np.testing.assert_array_equal(c_last[0], c[0])
    np.testing.assert_array_equal(h_last[0], h[0])
    np.testing.assert_array_equal(y[0], jnp.broadcast_to(h[0], y[0].shape))


@pytest.mark.parametrize("shape", [(2, 0, FEATURES), (0, 3, FEATURES)])
def test_no_time_and_no_batch_have_zero_gradients(shape):
    _, w, r, b, *_ = arguments(dtype=jnp.float32)
    x = jnp.zeros(shape)
    y, (c, _) = lstm(x, w, r, b)
    assert y.shape == (*shape[:2], HIDDEN)
    assert c.shape == (shape[0], HIDDEN)
    grads = jit_grad(lambda *a: loss(lstm(*a)), (0, 1, 2, 3))(x, w, r, b)
    assert all(not g.any() for g in grads)


def test_huge_inputs_have_finite_gradients():
    x, *rest = arguments(dtype=jnp.float32)
    _, grads = results(ours, x * 1e30, *rest)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.devices(4)
def test_weights_shared_by_devices_get_the_gradient_of_the_whole_batch():
    with jax.enable_x64(True):
        x, w, r, b, *_ = arguments((4,), time=5)
        mesh = Mesh(np.array(jax.devices()[:4]), "data")
        shared = jax.shard_map(lambda *a: lstm(*a)[0], mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=P("data"))
        assert_trees_close(results(shared, x, w, r, b), results(lambda *a: lstm(*a)[0], x, w, r, b), rtol=1e-10, atol=1e-12)


# Dtypes


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_dtypes_are_those_of_flax(dtype, x_dtype):
    make = lambda rnn: rnn(nnx.OptimizedLSTMCell(FEATURES, HIDDEN, dtype=dtype, rngs=nnx.Rngs(1)))
    x = (4 * draw(1, (2, 5, FEATURES), jnp.float32)).astype(x_dtype)
    (carry, y), (carry_flax, y_flax) = (make(rnn)(x, return_carry=True) for rnn in (RNN, nnx.RNN))
    assert y.dtype == y_flax.dtype
    assert [s.dtype for s in carry] == [s.dtype for s in carry_flax]
    np.testing.assert_allclose(y, y_flax, rtol=0.1 if dtype else 1e-5, atol=0.03 if dtype else 1e-6)


def test_second_derivative_and_forward_mode_in_bfloat16_are_finite():
    args = arguments(dtype=jnp.bfloat16, time=4)
    f = lambda *a: loss(ours(*a)).astype(jnp.float32)
    slopes = jax.jit(lambda: (jax.jvp(f, args, args)[1], jax.jvp(jax.grad(f), args, args)[1]))()
    assert all(jnp.isfinite(x.astype(jnp.float32)).all() for x in slopes)


# What is left to Flax, and errors


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (lambda: nnx.SimpleCell(FEATURES, HIDDEN, rngs=nnx.Rngs(0)), "its cell is a SimpleCell"),
        (lambda: nnx.LSTMCell(FEATURES, HIDDEN, gate_fn=jax.nn.hard_sigmoid, rngs=nnx.Rngs(0)), "activations of its own"),
        (lambda: nnx.LSTMCell(FEATURES, HIDDEN, promote_dtype=lambda a, dtype: a, rngs=nnx.Rngs(0)), "promotions of its own"),
    ],
)
def test_other_cells_are_left_to_flax(cell, why):
    x = draw(1, (2, 5, FEATURES), jnp.float32)
    assert why in RNN.swap_obstacle(RNN(cell()))
    np.testing.assert_array_equal(RNN(cell())(x), nnx.RNN(cell())(x))


def test_base_class_knows_no_cell():
    assert WholeSequences.swap_obstacle(LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0)))


def _call(**changes):
    given = {"x": jnp.ones((2, 5, 3)), "input_kernel": jnp.ones((3, 16)), "recurrent_kernel": jnp.ones((4, 16)), "bias": jnp.ones(16)}
    return lstm(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.ones((2, 5, 3), int)}, TypeError, "lstm: x is of dtype int"),
        ({"x": jnp.ones(3)}, ValueError, r"lstm: x has shape \(3,\), but must be \(\*batch, time, features\)"),
        ({"input_kernel": jnp.ones((2, 16))}, ValueError, r"lstm: input_kernel has shape \(2, 16\), but must be .* = \(3, 16\)"),
        ({"recurrent_kernel": jnp.ones((4, 12))}, ValueError, r"lstm: recurrent_kernel has shape \(4, 12\), but must be \(hidden, 4 \* hidden\)"),
        ({"bias": jnp.ones(4)}, ValueError, r"lstm: bias has shape \(4,\)"),
        ({"initial_carry": (jnp.ones((2, 4)),)}, ValueError, "lstm: initial_carry is .*, but must be a tuple of 2 arrays"),
        ({"initial_carry": (jnp.ones((2, 3)),) * 2}, ValueError, r"lstm: initial_carry has shape \(2, 3\), but must be \(\*batch, hidden\)"),
        ({"seq_lengths": jnp.ones(2)}, TypeError, "lstm: seq_lengths is of dtype float32"),
        ({"seq_lengths": jnp.ones(3, int)}, ValueError, r"lstm: seq_lengths has shape \(3,\)"),
        ({"dtype": jnp.int32}, TypeError, "lstm: dtype is .*, but must be a real floating-point dtype"),
        ({"dtype": bool}, TypeError, "lstm: dtype is"),
        ({"save": "all"}, ValueError, "lstm: save is 'all', but must be one of 'states', 'gates'"),
    ],
)
def test_wrong_arguments_are_explained(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)
