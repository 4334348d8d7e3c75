"""The short convolution against XLA's, decoding step by step, its edges and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.recurrent.short_convolution import short_convolution
from tests.recurrent.cells import draw, results
from tests.support import assert_trees_close, jit_grad, saved_bytes, temp_bytes


def arguments(batch=2, time=7, features=3, width=4, dtype=jnp.float64):
    return tuple(draw(i, s, dtype) for i, s in enumerate([(batch, time, features), (width, features), (features,), (batch, width - 1, features)]))


def by_xla(x, kernel, bias, initial):
    """XLA's depthwise convolution, which is Flax's, of what was before and the sequence, and SiLU."""
    window = jnp.concatenate([initial, x], 1)
    layout = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": x.shape[2]}
    return jax.nn.silu(jax.lax.conv_general_dilated(window, kernel[:, None], (1,), "VALID", **layout) + bias), window[:, x.shape[1] :]


def ours(x, kernel, bias, initial, activation="silu"):
    return short_convolution(x, kernel, bias, initial_state=initial, activation=activation, return_state=True)


@pytest.mark.parametrize(("time", "width"), [(70, 4), (2, 4), (65, 1)])
def test_values_and_gradients_are_those_of_a_convolution_of_xla(time, width):
    with jax.enable_x64(True):
        args = arguments(time=time, width=width)
        assert_trees_close(results(ours, *args), results(by_xla, *args), rtol=1e-10, atol=1e-12)


def test_forward_mode_and_second_derivatives_are_those_of_a_convolution_of_xla():
    with jax.enable_x64(True):
        args = arguments(time=4, features=2, width=3)
        moved = tuple(jnp.cos(a) for a in args)
        total = lambda run: lambda *a: sum(jnp.sum(jnp.sin(y)) for y in run(*a))
        both = lambda run: (jax.jvp(run, args, moved)[1], jax.jvp(jax.grad(total(run), (0, 1, 2, 3)), args, moved)[1])
        assert_trees_close(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(by_xla))(), rtol=1e-9, atol=1e-10)


def test_parts_of_a_sequence_continue_from_the_state():
    x, kernel, bias, state = arguments(dtype=jnp.float32)
    whole, last = ours(x, kernel, bias, state)
    outs = []
    for part in jnp.split(x, [1, 2, 5], 1):
        out, state = ours(part, kernel, bias, state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, rtol=1e-6)
    np.testing.assert_array_equal(state, last)


def test_state_after_a_packed_row_is_of_its_last_sequence():
    x, kernel, bias, state = arguments(dtype=jnp.float32)
    _, last = short_convolution(x, kernel, bias, initial_state=state, return_state=True, segment_ids=jnp.array([[0] * 6 + [1], [5] * 7]))
    np.testing.assert_array_equal(last[0], jnp.stack([jnp.zeros(3), jnp.zeros(3), x[0, -1]]))
    np.testing.assert_array_equal(last[1], x[1, -3:])


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3)])
def test_no_time_and_no_batch_have_zero_gradients(shape):
    _, kernel, bias, _ = arguments(dtype=jnp.float32)
    run = functools.partial(short_convolution, activation="silu", return_state=True)
    y, state = run(jnp.ones(shape), kernel, bias)
    assert y.shape == shape
    assert state.shape == (shape[0], 3, 3)
    grads = jit_grad(lambda *a: sum(jnp.sum(y) for y in run(*a)), (0, 1, 2))(jnp.ones(shape), kernel, bias)
    assert not any(g.any() for g in grads)


def test_infinite_inputs_have_the_limits_of_silu():
    x = jnp.array([-jnp.inf, 1.0, jnp.inf]).reshape(1, 3, 1)
    y, pull = jax.vjp(lambda x: short_convolution(x, jnp.ones((1, 1)), activation="silu"), x)
    np.testing.assert_array_equal(y[0, ::2, 0], [0.0, jnp.inf])
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0][0, ::2, 0], [0.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_not_above_that_of_autodiff(dtype):
    args = tuple(a.astype(dtype) for a in arguments(time=300, features=8, dtype=jnp.float32))
    mine, theirs = (results(run, *args) for run in (ours, by_xla))
    with jax.enable_x64(True):
        exact = jax.device_get(results(by_xla, *(a.astype(jnp.float64) for a in args)))
    error = lambda got: np.array([np.linalg.norm(np.asarray(a, np.float64) - e) for a, e in zip(*map(jax.tree.leaves, (got, exact)), strict=True)])
    assert np.all(error(mine) <= 1.05 * error(theirs)), error(mine) / error(theirs)
    assert all(g.dtype == dtype for g in mine[1])


def test_saves_its_arguments_and_takes_no_more_than_half_the_temporary_memory_of_autodiff():
    x, kernel, bias, initial = arguments(4, 512, 64, dtype=jnp.float32)
    args = x, kernel, bias, initial
    assert saved_bytes(lambda *a: ours(*a)[0], *args) <= 0
    back = lambda run: lambda dout, *args: jax.vjp(lambda *args: run(*args)[0], *args)[1](dout)
    mine, theirs = (temp_bytes(back(run), x, *args) for run in (ours, by_xla))
    assert mine <= 0.5 * theirs, (mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((7, 3))}, ValueError, "x has shape"),
        ({"x": jnp.ones((2, 7, 3), int)}, TypeError, "x is of dtype int"),
        ({"kernel": jnp.ones((4, 2))}, ValueError, "kernel has shape"),
        ({"kernel": jnp.ones((0, 3))}, ValueError, "kernel has shape"),
        ({"bias": jnp.ones(4)}, ValueError, "bias has shape"),
        ({"initial_state": jnp.ones((2, 4, 3))}, ValueError, "initial_state has shape"),
        ({"activation": "swoosh"}, ValueError, "activation is 'swoosh'"),
    ],
)
def test_bad_arguments_are_errors(change, error, message):
    x, kernel, bias, initial = arguments(dtype=jnp.float32)
    with pytest.raises(error, match=message):
        short_convolution(**({"x": x, "kernel": kernel, "bias": bias, "initial_state": initial} | change))
