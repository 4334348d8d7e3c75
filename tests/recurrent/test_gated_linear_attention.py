"""Gated linear attention against the recurrence in float64, its exactness for strong decay, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.recurrent.gated_linear_attention import gated_linear_attention
from tests.support import assert_trees_close, temp_bytes


def draw(length=11, heads=2, features=3, values=4, dtype=jnp.float64):
    shapes = (2, length, heads, features), (2, length, heads, features), (2, length, heads, values), (2, length, heads, features)
    q, k, v, g = (jax.random.normal(key, s, dtype) for key, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True))
    return q, k, v, -jnp.abs(g), jax.random.normal(jax.random.key(9), (2, heads, features, values), dtype)


def naive(q, k, v, g, initial):
    def step(s, x):
        q, k, v, g = x
        s = jnp.exp(g)[..., None] * s + k[..., None] * v[..., None, :]
        return s, jnp.einsum("bhk,bhkv->bhv", q, s) * q.shape[-1] ** -0.5

    last, out = jax.lax.scan(step, initial, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g)))
    return jnp.moveaxis(out, 0, 1), last


def ours(q, k, v, g, initial, chunk_size=4):
    return gated_linear_attention(q, k, v, g, initial_state=initial, return_state=True, chunk_size=chunk_size)


@functools.cache
def by_chunks_of(steps):
    return jax.jit(functools.partial(ours, chunk_size=steps))


def loss(run):
    def of(*args):
        out, last = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in run(*args))
        return jnp.sum(jnp.sin(out) * jnp.arange(out.shape[-1])) + jnp.sum(last**2)

    return of


@functools.cache
def compiled(run):
    return jax.jit(lambda *a: (run(*a), jax.grad(loss(run), tuple(range(5)))(*a)))


def values_and_gradients(run, args):
    return compiled(run)(*args)


@pytest.mark.parametrize(("length", "chunk"), [(11, 4), (8, 8), (1, 64)])
def test_values_and_gradients_are_those_of_the_recurrence(length, chunk):
    with jax.enable_x64(True):
        args = draw(length)
        mine = values_and_gradients(by_chunks_of(chunk), args)
        assert_trees_close(mine, values_and_gradients(naive, args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["strong", "mixed", "forgets", "grows"])
def test_strong_decay_costs_no_digits(kind):
    """In float32, against float64; where the state grows, so does the error, but not beyond that of the recurrence by autodiff."""
    q, k, v, g, s = draw(37, dtype=jnp.float32)
    often = jax.random.bernoulli(jax.random.key(4), 0.3, g.shape)
    strong = {"strong": jnp.full_like(g, -50.0), "mixed": jnp.where(often, -50.0, g / 100), "forgets": jnp.where(often, -jnp.inf, g), "grows": -g / 8}
    args = q, k, v, strong[kind], s
    mine = values_and_gradients(by_chunks_of(16), args)
    rival = values_and_gradients(naive, args)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, values_and_gradients(naive, tuple(a.astype(jnp.float64) for a in args)))
    for a, r, e in zip(*map(jax.tree.leaves, (mine, rival, exact)), strict=True):
        assert np.isfinite(a).all()
        limit = np.max(np.abs(np.asarray(r) - e)) if kind == "grows" else 5e-6 * max(1e-3, np.max(np.abs(e)))
        assert np.max(np.abs(np.asarray(a) - e)) <= limit


def test_forward_mode_and_second_derivatives_are_those_of_the_recurrence():
    with jax.enable_x64(True):
        args = draw(5, heads=1, features=2, values=2)
        moved = tuple(jnp.cos(a) for a in args)
        every = tuple(range(5))
        both = lambda run: (jax.jvp(loss(run), args, moved)[1], jax.jvp(jax.grad(loss(run), every), args, moved)[1])
        assert_trees_close(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(naive))(), rtol=1e-9, atol=1e-9)


def test_parts_of_a_sequence_continue_from_the_state():
    q, k, v, g, s = draw(12, dtype=jnp.float32)
    run = by_chunks_of(4)
    whole, last = run(q, k, v, g, s)
    first, state = run(*(x[:, :6] for x in (q, k, v, g)), s)
    second, end = run(*(x[:, 6:] for x in (q, k, v, g)), state)
    assert_trees_close((jnp.concatenate([first, second], 1), end), (whole, last), rtol=1e-5, atol=1e-5)


def test_empty_sequence_returns_the_state():
    q, k, v, g, s = draw(0, dtype=jnp.float32)
    out, last = ours(q, k, v, g, s)
    assert out.shape == v.shape
    np.testing.assert_array_equal(last, s)


def test_empty_batch_has_an_empty_gradient():
    args = tuple(x[:0] for x in draw(3, dtype=jnp.float32))
    assert ours(*args)[0].shape == (0, 3, 2, 4)
    assert jax.grad(loss(ours))(*args).shape == args[0].shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_not_above_that_of_autodiff(dtype):
    """Of the output, of the last state and of every gradient: what has faded most is added first, as a loop over steps does."""
    args = tuple(a.astype(dtype) for a in draw(128, heads=16, features=16, values=16, dtype=jnp.float32))  # enough for an average
    mine, theirs = (values_and_gradients(run, args) for run in (by_chunks_of(64), naive))
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, values_and_gradients(naive, tuple(a.astype(jnp.float64) for a in args)))
    error = lambda got: np.array([np.linalg.norm(np.asarray(a, np.float64) - e) for a, e in zip(*map(jax.tree.leaves, (got, exact)), strict=True)])
    assert all(d.dtype == dtype for d in mine[1])
    assert np.all(error(mine) <= error(theirs)), error(mine) / error(theirs)


def test_takes_a_twentieth_of_the_temporary_memory_of_scan():
    args = jax.eval_shape(lambda: draw(1024, 2, 32, 32, jnp.float32))
    mine, theirs = (temp_bytes(jax.grad(loss(run), (0, 1, 2, 3)), *args) for run in (lambda *a: ours(*a, chunk_size=64), naive))
    assert mine <= 0.05 * theirs, (mine, theirs)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, jnp.ones((2, 3, 4)), ValueError, "q has shape"),
        (1, jnp.ones((2, 11, 2, 4)), ValueError, "k has shape"),
        (2, jnp.ones((2, 10, 2, 4)), ValueError, "v has shape"),
        (3, jnp.ones((2, 11, 2, 3), int), TypeError, "g is of dtype int"),
        (4, jnp.ones((2, 2, 4, 3)), ValueError, "initial_state has shape"),
    ],
)
def test_bad_arguments_are_errors(place, value, error, message):
    args = list(draw(dtype=jnp.float32))
    args[place] = value
    with pytest.raises(error, match=message):
        ours(*args)


def test_chunk_that_is_no_power_of_two_is_an_error():
    with pytest.raises(ValueError, match="chunk_size is 6"):
        ours(*draw(dtype=jnp.float32), chunk_size=6)


def test_scale_may_be_traced_and_has_a_gradient():
    *arrays, _ = draw(dtype=jnp.float32)
    value_and_grad = jax.jit(jax.value_and_grad(lambda scale: jnp.sum(gated_linear_attention(*arrays, scale=scale, chunk_size=4) ** 2)))
    value, slope = value_and_grad(jnp.asarray(0.5))
    np.testing.assert_allclose(slope, 4 * value, rtol=1e-5)
    out = gated_linear_attention(*arrays, scale=0.5, chunk_size=4)
    np.testing.assert_allclose(value, jnp.sum(out**2), rtol=1e-5)
