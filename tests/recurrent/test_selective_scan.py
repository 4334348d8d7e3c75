"""The selective scan against a loop over the formula in float64, and its memory against `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.recurrent.selective_scan import CHUNK, selective_scan
from tests.support import assert_trees_close, jit_grad, saved_bytes, temp_bytes


def draw(length=2 * CHUNK + 3, batch=2, features=3, state=4, dtype=jnp.float64):
    shapes = {
        "u": (batch, length, features),
        "delta": (batch, length, features),
        "A": (features, state),
        "B": (batch, length, state),
        "C": (batch, length, state),
        "D": (features,),
        "z": (batch, length, features),
        "delta_bias": (features,),
        "initial_state": (batch, features, state),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = {name: jax.random.normal(k, s, dtype) for k, (name, s) in zip(keys, shapes.items(), strict=True)}
    return drawn | {"A": -jnp.exp(drawn["A"])}


def naive(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, delta_softplus=True):
    delta = delta if delta_bias is None else delta + delta_bias
    delta = jax.nn.softplus(delta) if delta_softplus else delta

    def step(h, x):
        u, d, b, c = x
        h = jnp.exp(d[:, :, None] * A) * h + (d * u)[:, :, None] * b[:, None]
        return h, (h * c[:, None]).sum(-1)

    start = jnp.zeros((u.shape[0], *A.shape), A.dtype) if initial_state is None else initial_state
    last, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C)))
    y = jnp.moveaxis(y, 0, 1)
    y = y if D is None else y + D * u
    return (y if z is None else y * jax.nn.silu(z)), last


def ours(delta_softplus=True, **arrays):
    return selective_scan(**arrays, delta_softplus=delta_softplus, return_last_state=True)


def loss(run, **options):
    def of(arrays):
        y, last = run(**arrays, **options)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.shape[-1])) + jnp.sum(last**2)

    return of


def test_values_are_those_of_a_loop_in_numpy():
    with jax.enable_x64(True):
        x = {name: np.asarray(a) for name, a in draw().items()}
        h, out = x["initial_state"], []
        d = np.log1p(np.exp(x["delta"] + x["delta_bias"]))
        for t in range(x["u"].shape[1]):
            h = np.exp(d[:, t, :, None] * x["A"]) * h + (d * x["u"])[:, t, :, None] * x["B"][:, t, None]
            y = (h * x["C"][:, t, None]).sum(-1) + x["D"] * x["u"][:, t]
            out.append(y * x["z"][:, t] / (1 + np.exp(-x["z"][:, t])))
        y, last = ours(**x)
        np.testing.assert_allclose(y, np.stack(out, 1), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(last, h, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("length", [2 * CHUNK + 3, CHUNK, 1])
def test_gradients_are_those_of_the_loop(length):
    with jax.enable_x64(True):
        x = draw(length)
        mine, theirs = (jax.jit(jax.value_and_grad(loss(run)))(x) for run in (ours, naive))
        assert_trees_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_optional_arguments_may_be_left_out():
    with jax.enable_x64(True):
        x = {name: a for name, a in draw(CHUNK + 1).items() if name in ("u", "delta", "A", "B", "C")}
        mine, theirs = (jax.jit(jax.value_and_grad(loss(run, delta_softplus=False)))(x | {"delta": x["delta"] ** 2}) for run in (ours, naive))
        assert_trees_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_forward_mode_and_second_derivatives_are_those_of_the_loop():
    with jax.enable_x64(True):
        x = draw(CHUNK + 2, batch=1, features=2, state=2)
        v = jax.tree.map(jnp.cos, x)

        def both(run):
            f = loss(run)
            slope = jax.jvp(f, (x,), (v,))[1]
            over = jax.jvp(jax.grad(f), (x,), (v,))[1]
            twice = jit_grad(lambda x: sum(jnp.vdot(g, w) for g, w in zip(jax.tree.leaves(jax.grad(f)(x)), jax.tree.leaves(v), strict=True)))(x)
            return slope, over, twice

        assert_trees_close(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(naive))(), rtol=1e-8, atol=1e-9)


def test_parts_of_a_sequence_continue_from_the_last_state():
    x = draw(20, dtype=jnp.float32)
    x.pop("initial_state")
    of_time = ("u", "delta", "B", "C", "z")
    run = jax.jit(ours)
    whole, last = run(**x)
    first, state = run(**{k: a[:, :7] if k in of_time else a for k, a in x.items()})
    second, end = run(**{k: a[:, 7:] if k in of_time else a for k, a in x.items()}, initial_state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-6)


def test_empty_sequence_returns_the_initial_state():
    x = draw(0, dtype=jnp.float32)
    y, last = ours(**x)
    assert y.shape == (2, 0, 3)
    np.testing.assert_array_equal(last, x["initial_state"])
    assert jit_grad(loss(ours))(x)["A"].shape == (3, 4)


def test_huge_step_sizes_and_rates_have_finite_gradients():
    x = draw(5, dtype=jnp.float32)
    x |= {"A": x["A"] * 1e4, "delta": x["delta"] * 1e3}
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss(ours)))(x)))


def test_closed_gate_has_output_and_gradient_zero():
    x = draw(3, batch=1, features=1, dtype=jnp.float32)
    x["z"] = jnp.array([-jnp.inf, 1.0, -jnp.inf]).reshape(1, 3, 1)
    grads = jax.jit(jax.grad(loss(ours)))(x)
    np.testing.assert_array_equal(ours(**x)[0][0, ::2], 0.0)
    np.testing.assert_array_equal(grads["z"][0, ::2], 0.0)
    assert all(jnp.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_error_is_not_above_that_of_autodiff_and_float32_error_is_rounding(dtype):
    x = {k: a.astype(dtype) for k, a in draw(200, features=8, dtype=jnp.float32).items()}
    f = lambda run: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(**x)[0].astype(jnp.promote_types(x["u"].dtype, jnp.float32))))))
    mine, theirs = f(ours)(x), f(naive)(x)
    with jax.enable_x64(True):
        exact = {k: np.asarray(g) for k, g in f(naive)({k: a.astype(jnp.float64) for k, a in x.items()}).items()}
    error = lambda grads: sum(np.linalg.norm(np.asarray(g, np.float64) - exact[k]) / np.linalg.norm(exact[k]) for k, g in grads.items())
    assert error(mine) <= (error(theirs) if dtype == jnp.bfloat16 else len(mine) * 1e-6)
    assert all(mine[k].dtype == dtype for k in mine)


def test_saves_a_state_a_chunk_only():
    x = draw(8 * CHUNK, features=16, state=8, dtype=jnp.float32)
    assert saved_bytes(lambda x: ours(**x), x) <= 8 * 2 * 16 * 8 * 4


def test_takes_a_tenth_of_the_temporary_memory_of_scan():
    x = jax.eval_shape(lambda: {k: a for k, a in draw(1024, features=128, state=16, dtype=jnp.float32).items() if k in ("u", "delta", "A", "B", "C")})
    mine, theirs = (temp_bytes(jax.grad(lambda x, run=run: jnp.sum(run(**x, delta_softplus=False)[0] ** 2)), x) for run in (ours, naive))
    assert mine <= 0.09 * theirs, (mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": jnp.ones((3, 2))}, ValueError, "u has shape"),
        ({"A": jnp.ones((2, 4))}, ValueError, "A has shape"),
        ({"B": jnp.ones((2, 5, 3))}, ValueError, "B has shape"),
        ({"delta_bias": jnp.ones(4)}, ValueError, "delta_bias has shape"),
        ({"C": jnp.ones((2, 5, 4), int)}, TypeError, "C is of dtype int"),
        ({"A": jnp.ones((3, 4), complex)}, TypeError, "A is of dtype complex"),
    ],
)
def test_bad_arguments_are_errors(change, error, message):
    with pytest.raises(error, match=message):
        ours(**(draw(5, dtype=jnp.float32) | change))
