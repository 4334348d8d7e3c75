"""The gated delta rule against the recurrence step by step in float64, its edges, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.machine import compiling_for
from layers.recurrent import chunks
from layers.recurrent.gated_delta_rule import gated_delta_rule
from tests.recurrent.cells import draw as normal
from tests.support import assert_trees_close, jit_grad, temp_bytes


def draw(length=11, heads=2, features=3, values=4, dtype=jnp.float64, batch=2):
    q, k = (normal(i, (batch, length, heads, features), dtype) for i in range(2))
    v, g, beta = normal(2, (batch, length, heads, values), dtype), *(normal(i, (batch, length, heads), dtype) for i in (3, 4))
    k = k * jax.lax.rsqrt(jnp.sum(k * k, -1, keepdims=True))
    return q, k, v, -jnp.abs(g), jax.nn.sigmoid(beta), normal(5, (batch, heads, features, values), dtype)


def step_by_step(q, k, v, g, beta, initial):
    def step(s, x):
        q, k, v, g, beta = x
        s = jnp.exp(g)[..., None, None] * (s - beta[..., None, None] * k[..., None] * jnp.einsum("bhk,bhkv->bhv", k, s)[..., None, :])
        s = s + beta[..., None, None] * k[..., None] * v[..., None, :]
        return s, jnp.einsum("bhk,bhkv->bhv", q, s) * q.shape[-1] ** -0.5

    last, out = jax.lax.scan(step, initial, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)))
    return jnp.moveaxis(out, 0, 1), last


def ours(q, k, v, g, beta, initial, chunk_size=4):
    return gated_delta_rule(q, k, v, g, beta, initial_state=initial, return_state=True, chunk_size=chunk_size)


def loss(run):
    def of(*args):
        out, last = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in run(*args))
        return jnp.sum(jnp.sin(out) * jnp.arange(out.shape[-1])) + jnp.sum(last**2)

    return of


@functools.cache
def compiled(run):
    return jax.jit(lambda *a: (run(*a), jax.grad(loss(run), tuple(range(6)))(*a)))


@functools.cache
def by_chunks_of(steps):
    return functools.partial(ours, chunk_size=steps)


@pytest.mark.parametrize(("length", "chunk", "device"), [(11, 4, "cpu"), (11, 4, "cuda"), (1, 64, "cpu")])
def test_values_and_gradients_are_those_of_the_recurrence(length, chunk, device, monkeypatch):
    """Chunk by chunk, and as on an accelerator: several chunks at once, in spans of two."""
    monkeypatch.setattr(chunks, "SPAN_BYTES", 1 << 15)
    with jax.enable_x64(True), compiling_for(device):
        args = draw(length)
        run = lambda *a: by_chunks_of(chunk)(*a)
        assert_trees_close(compiled(run)(*args), compiled(step_by_step)(*args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["strong", "mixed", "forgets", "keeps", "writes nothing", "overwrites"])
def test_extreme_decays_and_shares_cost_no_digits(kind):
    """In float32, against float64."""
    q, k, v, g, beta, s = draw(37, dtype=jnp.float32)
    often = jax.random.bernoulli(jax.random.key(4), 0.3, g.shape)
    decays = {"strong": jnp.full_like(g, -50.0), "mixed": jnp.where(often, -50.0, g / 100), "forgets": jnp.where(often, -jnp.inf, g), "keeps": 0 * g}
    shares = {"writes nothing": 0 * beta, "overwrites": jnp.ones_like(beta)}
    args = q, k, v, decays.get(kind, g), shares.get(kind, beta), s
    mine = compiled(by_chunks_of(16))(*args)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, compiled(step_by_step)(*(a.astype(jnp.float64) for a in args)))
    for a, e in zip(*map(jax.tree.leaves, (mine, exact)), strict=True):
        assert np.isfinite(a).all()
        assert np.max(np.abs(np.asarray(a) - e)) <= 2e-5 * max(1e-3, np.max(np.abs(e)))


def test_share_of_one_replaces_what_was_stored_for_a_key():
    """The delta rule's own promise: a key that was written twice is read as its second value."""
    key = jnp.array([0.6, 0.8])
    k = jnp.broadcast_to(key, (1, 2, 1, 2))
    v = jnp.array([[[[1.0, 2.0]], [[5.0, -3.0]]]])
    out = gated_delta_rule(k, k, v, jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1)), scale=1.0)
    np.testing.assert_allclose(out, v, rtol=1e-6)


def test_forward_mode_and_second_derivatives_are_those_of_the_recurrence():
    with jax.enable_x64(True):
        args = draw(5, heads=1, features=2, values=2, batch=1)
        moved = tuple(jnp.cos(a) for a in args)
        every = tuple(range(6))
        both = lambda run: (jax.jvp(loss(run), args, moved)[1], jax.jvp(jax.grad(loss(run), every), args, moved)[1])
        assert_trees_close(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(step_by_step))(), rtol=1e-9, atol=1e-9)


def test_parts_of_a_sequence_continue_from_the_state():
    *rows, s = draw(12, dtype=jnp.float32)
    run = jax.jit(ours)
    whole, last = run(*rows, s)
    first, state = run(*(x[:, :6] for x in rows), s)
    second, end = run(*(x[:, 6:] for x in rows), state)
    assert_trees_close((jnp.concatenate([first, second], 1), end), (whole, last), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "batch"), [(0, 2), (3, 0)])
def test_no_time_and_no_batch(length, batch):
    *rows, s = draw(length, dtype=jnp.float32, batch=batch)
    out, last = ours(*rows, s)
    assert out.shape == (batch, length, 2, 4)
    if not length:
        np.testing.assert_array_equal(last, s)
    assert jit_grad(loss(ours))(*rows, s).shape == rows[0].shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_not_far_above_that_of_autodiff(dtype):
    """The solution of a chunk adds up in another order than the steps do."""
    args = tuple(a.astype(dtype) for a in draw(128, features=16, values=16, dtype=jnp.float32))
    mine, theirs = (compiled(run)(*args) for run in (by_chunks_of(64), step_by_step))
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, compiled(step_by_step)(*(a.astype(jnp.float64) for a in args)))
    error = lambda got: np.array([np.linalg.norm(np.asarray(a, np.float64) - e) for a, e in zip(*map(jax.tree.leaves, (got, exact)), strict=True)])
    assert all(d.dtype == dtype for d in mine[1])
    assert np.all(error(mine) <= (2 if dtype == jnp.float32 else 1) * error(theirs)), error(mine) / error(theirs)


def test_takes_a_tenth_of_the_temporary_memory_of_scan():
    args = jax.eval_shape(lambda: draw(1024, 2, 32, 32, jnp.float32))
    mine, theirs = (temp_bytes(jax.grad(loss(run), (0, 1, 2, 3, 4)), *args) for run in (by_chunks_of(64), step_by_step))
    assert mine <= 0.1 * theirs, (mine, theirs)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, jnp.ones((2, 3, 4)), ValueError, "q has shape"),
        (1, jnp.ones((2, 11, 2, 4)), ValueError, "k has shape"),
        (2, jnp.ones((2, 10, 2, 4)), ValueError, "v has shape"),
        (3, jnp.ones((2, 11, 2, 3)), ValueError, "g has shape"),
        (4, jnp.ones((2, 11, 2), int), TypeError, "beta is of dtype int"),
        (5, jnp.ones((2, 2, 4, 3)), ValueError, "initial_state has shape"),
    ],
)
def test_bad_arguments_are_errors(place, value, error, message):
    args = list(draw(dtype=jnp.float32))
    args[place] = value
    with pytest.raises(error, match=f"gated_delta_rule: {message}"):
        ours(*args)
