"""The recurrence against a loop in NumPy and autodiff through it; its memory against `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from tests.support import assert_trees_close, jit_grad, saved_bytes, temp_bytes


def draw(shape, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return tuple(jax.random.normal(k, shape, dtype) for k in keys)


def in_numpy(a, b, initial, axis=0):
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    states, h = [], initial
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        states.append(h)
    return np.moveaxis(np.stack(states), 0, axis)


def by_autodiff(a, b, initial):
    return jax.lax.scan(lambda h, ab: (ab[0] * h + ab[1],) * 2, initial, (a, b))[1]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_values_are_those_of_a_loop(axis, dtype):
    with jax.enable_x64(True):
        a, b = draw((4, 5, 3), dtype)
        initial = jnp.moveaxis(b, axis, 0)[0] * 2
        np.testing.assert_allclose(layers.linear_recurrence(a, b, initial, axis=axis), in_numpy(a, b, np.asarray(initial), axis), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_gradient_is_that_of_the_unrolled_loop(dtype):
    with jax.enable_x64(True):
        a, b = draw((7, 3), dtype)
        initial, dh = b[0] * 2, a * b
        ours, theirs = (jax.vjp(f, a, b, initial)[1](dh) for f in (layers.linear_recurrence, by_autodiff))
        assert_trees_close(ours, theirs, rtol=1e-10)


def test_reverse_is_the_flipped_recurrence():
    a, b = draw((6, 2), jnp.float32)
    flipped = layers.linear_recurrence(a[::-1], b[::-1])[::-1]
    np.testing.assert_allclose(layers.linear_recurrence(a, b, reverse=True), flipped, rtol=1e-6)


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences(length):
    a, b = draw((length, 3), jnp.float32)
    np.testing.assert_array_equal(layers.linear_recurrence(a, b), b)
    assert jit_grad(lambda a: layers.linear_recurrence(a, b).sum())(a).shape == a.shape


def test_saves_nothing_beyond_arguments_and_output():
    a, b = draw((64, 32), jnp.float32)
    assert saved_bytes(layers.linear_recurrence, a, b) <= 32 * 4


def test_takes_half_the_temporary_memory_of_scan():
    a, b = draw((4096, 256), jnp.float32)
    start = jnp.zeros(256)
    both = [
        temp_bytes(jax.grad(lambda a, b, s, f=f: jnp.sum(f(a, b, s) ** 2), argnums=(0, 1)), a, b, start)
        for f in (layers.linear_recurrence, by_autodiff)
    ]
    assert both[0] <= 0.8 * both[1], both


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (((4, 3), (4, 2)), {}, "a has shape"),
        (((4, 3), (4, 3)), {"axis": 2}, "axis is 2"),
        (((4, 3), (4, 3), (4,)), {}, "initial has shape"),
    ],
)
def test_bad_shapes_are_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        layers.linear_recurrence(*[jnp.ones(s) for s in args], **options)


def test_half_precision_holds_the_state_wide():
    """a = 1 - 1/256: in bfloat16 itself the state would stop at half of its limit."""
    a, b = jnp.full(4096, 0.99609375, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16)
    h, pull = jax.vjp(lambda b: layers.linear_recurrence(a, b), b)
    assert h.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(h[-1]), 256, rtol=0.005)
    (db,) = pull(jnp.zeros_like(h).at[-1].set(1))
    np.testing.assert_allclose(float(db[-700]), 0.99609375**699, rtol=0.005)


def test_integers_are_an_error():
    with pytest.raises(TypeError, match="floating-point or complex"):
        layers.linear_recurrence(jnp.arange(3), jnp.arange(3))
