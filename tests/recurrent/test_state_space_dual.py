"""Mamba-2's scan against the recurrence step by step in float64 and against the selective scan; its edges, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.machine import compiling_for
from layers.recurrent import chunks
from layers.recurrent.selective_scan import selective_scan
from layers.recurrent.state_space_dual import state_space_dual
from tests.recurrent.cells import draw as normal
from tests.support import assert_trees_close, jit_grad, saved_bytes, temp_bytes

PLAIN = ("x", "dt", "A", "B", "C")


def draw(length=11, heads=4, size=3, groups=2, state=5, dtype=jnp.float64, batch=2):
    shapes = {
        "x": (batch, length, heads, size),
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": (batch, length, groups, state),
        "C": (batch, length, groups, state),
        "D": (heads,),
        "z": (batch, length, heads, size),
        "dt_bias": (heads,),
        "initial_state": (batch, heads, size, state),
    }
    drawn = {name: normal(i, s, dtype) for i, (name, s) in enumerate(shapes.items())}
    return drawn | {"A": -jnp.exp(drawn["A"])}


def step_by_step(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None, softplus=True):
    dt = dt if dt_bias is None else dt + dt_bias
    dt = jax.nn.softplus(dt) if softplus else dt
    B, C = (jnp.repeat(v, x.shape[2] // v.shape[2], 2) for v in (B, C))

    def step(h, row):
        x, dt, b, c = row
        h = jnp.exp(dt * A)[..., None, None] * h + (dt[..., None] * x)[..., None] * b[:, :, None]
        return h, jnp.einsum("bhpn,bhn->bhp", h, c)

    start = jnp.zeros((*x.shape[:1], *x.shape[2:], B.shape[3]), x.dtype) if initial_state is None else initial_state
    last, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, B, C)))
    y = jnp.moveaxis(y, 0, 1)
    y = y if D is None else y + D[:, None] * x
    return (y if z is None else y * jax.nn.silu(z)), last


def ours(softplus=True, chunk_size=4, **arrays):
    return state_space_dual(**arrays, dt_softplus=softplus, return_last_state=True, chunk_size=chunk_size)


def loss(run, **options):
    def of(arrays):
        y, last = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in run(**arrays, **options))
        return jnp.sum(jnp.sin(y) * jnp.arange(y.shape[-1])) + jnp.sum(last**2), y

    return of


def results(run, x, **options):
    return jax.jit(jax.value_and_grad(loss(run, **options), has_aux=True))(x)


@pytest.mark.parametrize(("length", "chunk", "device"), [(11, 4, "cpu"), (11, 4, "cuda"), (1, 64, "cpu")])
def test_values_and_gradients_are_those_of_the_recurrence(length, chunk, device, monkeypatch):
    """Chunk by chunk, and as on an accelerator: several chunks at once, in spans of two."""
    monkeypatch.setattr(chunks, "SPAN_BYTES", 1 << 15)
    with jax.enable_x64(True), compiling_for(device):
        x = draw(length)
        assert_trees_close(results(ours, x, chunk_size=chunk), results(step_by_step, x), rtol=1e-10, atol=1e-10)


def test_optional_arguments_may_be_left_out():
    with jax.enable_x64(True):
        x = {name: a for name, a in draw(5, groups=1).items() if name in PLAIN}
        x["dt"] = x["dt"] ** 2
        assert_trees_close(results(ours, x, softplus=False), results(step_by_step, x, softplus=False), rtol=1e-10, atol=1e-10)


def test_one_head_for_each_feature_is_the_selective_scan_with_one_rate():
    with jax.enable_x64(True):
        x = draw(9, heads=3, size=1, groups=1)
        y, last = ours(**x)
        flat = {"u": x["x"][..., 0], "delta": x["dt"], "A": jnp.broadcast_to(x["A"][:, None], (3, 5)), "B": x["B"][:, :, 0], "C": x["C"][:, :, 0]}
        more = {"D": x["D"], "z": x["z"][..., 0], "delta_bias": x["dt_bias"], "initial_state": x["initial_state"][:, :, 0]}
        expected, state = selective_scan(**flat, **more, delta_softplus=True, return_last_state=True)
        np.testing.assert_allclose(y[..., 0], expected, rtol=1e-10)
        np.testing.assert_allclose(last[:, :, 0], state, rtol=1e-10)


def test_forward_mode_and_second_derivatives_are_those_of_the_recurrence():
    with jax.enable_x64(True):
        x = draw(5, heads=2, size=2, groups=1, state=2, batch=1)
        v = jax.tree.map(jnp.cos, x)

        def both(run):
            f = lambda x: loss(run)(x)[0]
            return jax.jvp(f, (x,), (v,))[1], jax.jvp(jax.grad(f), (x,), (v,))[1]

        assert_trees_close(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(step_by_step))(), rtol=1e-9, atol=1e-9)


def test_parts_of_a_sequence_continue_from_the_last_state():
    x = draw(12, dtype=jnp.float32)
    state = x.pop("initial_state")
    of_time = ("x", "dt", "B", "C", "z")
    part = lambda cut: {k: a[:, cut] if k in of_time else a for k, a in x.items()}
    run = jax.jit(ours)
    whole, last = run(**x, initial_state=state)
    first, middle = run(**part(slice(7)), initial_state=state)
    second, end = run(**part(slice(7, None)), initial_state=middle)
    assert_trees_close((jnp.concatenate([first, second], 1), end), (whole, last), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "batch"), [(0, 2), (3, 0)])
def test_no_time_and_no_batch(length, batch):
    x = draw(length, dtype=jnp.float32, batch=batch)
    y, last = ours(**x)
    assert y.shape == x["x"].shape
    if not length:
        np.testing.assert_array_equal(last, x["initial_state"])
    assert jit_grad(lambda x: loss(ours)(x)[0])(x)["A"].shape == (4,)


@pytest.mark.parametrize("kind", ["strong", "forgets", "keeps", "huge"])
def test_extreme_step_sizes_cost_no_digits(kind):
    """In float32, against float64: a few of the last bits, or no more than the loop over steps loses."""
    x = draw(37, dtype=jnp.float32)
    often = jax.random.bernoulli(jax.random.key(4), 0.3, x["dt"].shape)
    x |= {
        "strong": {"A": x["A"] * 100},
        "forgets": {"dt": jnp.where(often, 60.0, x["dt"]), "A": x["A"] * 1e6},
        "keeps": {"A": 0 * x["A"]},
        "huge": {"dt": jnp.where(often, -1e4, x["dt"])},
    }[kind]
    mine, theirs = results(ours, x, chunk_size=16), results(step_by_step, x)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, results(step_by_step, {k: a.astype(jnp.float64) for k, a in x.items()}))
    for a, r, e in zip(*map(jax.tree.leaves, (mine, theirs, exact)), strict=True):
        assert np.isfinite(a).all()
        assert np.max(np.abs(np.asarray(a) - e)) <= max(2e-5 * max(1e-3, np.max(np.abs(e))), np.max(np.abs(np.asarray(r) - e)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_not_far_above_that_of_autodiff(dtype):
    x = {k: a.astype(dtype) for k, a in draw(128, size=16, state=16, dtype=jnp.float32).items()}
    mine, theirs = (results(run, x)[1] for run in (functools.partial(ours, chunk_size=64), step_by_step))
    with jax.enable_x64(True):
        exact = jax.device_get(results(step_by_step, {k: a.astype(jnp.float64) for k, a in x.items()})[1])
    error = lambda got: sum(np.linalg.norm(np.asarray(g, np.float64) - exact[k]) / np.linalg.norm(exact[k]) for k, g in got.items())
    assert error(mine) <= (2 if dtype == jnp.float32 else 1) * error(theirs), (error(mine), error(theirs))
    assert all(mine[k].dtype == dtype for k in mine)


def test_saves_a_state_a_chunk_only():
    x = draw(64, size=16, state=8, dtype=jnp.float32)
    assert saved_bytes(lambda x: ours(**x, chunk_size=16), x) <= 4 * 2 * 4 * 16 * 8 * 4


def test_takes_a_twentieth_of_the_temporary_memory_of_scan():
    x = jax.eval_shape(lambda: {k: a for k, a in draw(1024, 4, 32, 1, 32, jnp.float32).items() if k in PLAIN})
    mine, theirs = (
        temp_bytes(jax.grad(lambda x, run=run: loss(run, softplus=False)(x)[0]), x) for run in (functools.partial(ours, chunk_size=64), step_by_step)
    )
    assert mine <= 0.05 * theirs, (mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((3, 2))}, ValueError, "x has shape"),
        ({"A": jnp.ones((2, 4))}, ValueError, "A has shape"),
        ({"B": jnp.ones((2, 11, 3, 5))}, ValueError, "C has shape"),
        ({"B": jnp.ones((2, 11, 3, 5)), "C": jnp.ones((2, 11, 3, 5))}, ValueError, "B has 3 groups"),
        ({"dt_bias": jnp.ones(5)}, ValueError, "dt_bias has shape"),
        ({"C": jnp.ones((2, 11, 2, 5), int)}, TypeError, "C is of dtype int"),
        ({"chunk_size": 6}, ValueError, "chunk_size is 6"),
    ],
)
def test_bad_arguments_are_errors(change, error, message):
    with pytest.raises(error, match=f"state_space_dual: {message}"):
        ours(**(draw(dtype=jnp.float32) | change))
