"""Values, gradients of every order, limits, errors and memory of every activation and gate, beside `jax.nn`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.activations.geglu import geglu
from layers.activations.gelu import gelu
from layers.activations.mish import mish
from layers.activations.relu import relu
from layers.activations.relu_squared import relu_squared
from layers.activations.silu import silu
from layers.activations.softplus import softplus
from layers.activations.swiglu import swiglu
from tests.support import assert_trees_close, draw_normal, jit_grad, saved_bytes, temp_bytes

UNARY = {
    "relu": (relu, jax.nn.relu),
    "relu_squared": (relu_squared, lambda x: jnp.square(jax.nn.relu(x))),
    "silu": (silu, jax.nn.silu),
    "softplus": (softplus, jax.nn.softplus),
    "mish": (mish, jax.nn.mish),
    "gelu": (gelu, jax.nn.gelu),
    "gelu_exact": (partial(gelu, approximate=False), partial(jax.nn.gelu, approximate=False)),
}
GATES = {
    "swiglu": (swiglu, lambda gate, up: jax.nn.silu(gate) * up),
    "geglu": (geglu, lambda gate, up: jax.nn.gelu(gate) * up),
    "geglu_exact": (partial(geglu, approximate=False), lambda gate, up: jax.nn.gelu(gate, approximate=False) * up),
}
PAIRS = UNARY | GATES
EVERY = pytest.mark.parametrize("name", PAIRS)
EVERY_UNARY = pytest.mark.parametrize("name", UNARY)


def draw(name, shape, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2 if name in GATES else 1)
    return tuple(3 * jax.random.normal(k, shape, dtype) for k in keys)


def loss(fn, *args):
    y = fn(*args)
    return (jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape)).sum()


# Values and gradients


@EVERY
def test_values_are_those_of_jax_nn_bit_for_bit(name):
    ours, theirs = PAIRS[name]
    args = draw(name, (64, 33))
    np.testing.assert_array_equal(jax.jit(ours)(*args), jax.jit(theirs)(*args))


@EVERY
def test_gradients_of_both_orders_and_tangents_are_those_of_autodiff_in_float64(name):
    def everything(fn, args):
        indices = tuple(range(len(args)))
        first = jit_grad(partial(loss, fn), indices)
        dot = lambda *a: sum((g * jnp.cos(x)).sum() for g, x in zip(first(*a), a, strict=True))
        tangents = jax.jvp(partial(loss, fn), args, args)[1]
        return first(*args), jax.grad(dot, indices)(*args), tangents, jax.jvp(first, args, args)[1]

    with jax.enable_x64(True):
        args = draw(name, (40,), jnp.float64)
        ours, theirs = (jax.jit(partial(everything, fn))(args) for fn in PAIRS[name])
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@EVERY
def test_error_is_not_above_that_of_autodiff(name, dtype):
    """Against float64, summed over many elements; values and gradients."""
    args = tuple(a.astype(dtype) for a in draw(name, (1 << 14,)))
    dy = draw_normal(9, (1 << 14,)).astype(dtype)

    def run(fn, *args):
        y, pull = jax.vjp(fn, *args)
        return y, *pull(dy.astype(y.dtype))

    ours, theirs = PAIRS[name]
    found = [jax.jit(partial(run, fn))(*args) for fn in (ours, theirs)]
    with jax.enable_x64(True):
        exact = jax.jit(partial(run, theirs))(*(jnp.asarray(a, jnp.float64) for a in args))
        errors = [[np.abs(np.asarray(a, np.float64) - e).sum() for a, e in zip(way, exact, strict=True)] for way in found]
    for mine, autodiff in zip(*errors, strict=True):
        assert mine <= autodiff * 1.001


@EVERY
def test_half_precision_is_float32_rounded_once(name):
    args = tuple(a.astype(jnp.bfloat16) for a in draw(name, (1000,)))
    fn = jax.jit(PAIRS[name][0])
    np.testing.assert_array_equal(fn(*args), fn(*(a.astype(jnp.float32) for a in args)).astype(jnp.bfloat16))


# Edge cases


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@EVERY_UNARY
def test_value_and_slope_have_their_limits_at_infinity_and_far_out(name, dtype):
    inf = jnp.inf
    x = jnp.array([-inf, -3e38, -1e20, -1e4, 1e4, 1e20, 3e38, inf], dtype)
    y, slope = jax.jit(jax.vmap(jax.value_and_grad(UNARY[name][0])))(x)
    np.testing.assert_array_equal(y[:4], jnp.zeros(4))
    np.testing.assert_array_equal(slope[:4], jnp.zeros(4))
    positive = x[4:]
    np.testing.assert_array_equal(y[4:], positive**2 if name == "relu_squared" else positive)
    np.testing.assert_array_equal(slope[4:], 2 * positive if name == "relu_squared" else jnp.ones(4))


@EVERY_UNARY
def test_second_derivative_is_finite_at_infinity(name):
    x = jnp.array([-jnp.inf, -3e38, 0, 3e38, jnp.inf])
    assert jnp.isfinite(jax.jit(jax.vmap(jax.grad(jax.grad(UNARY[name][0]))))(x)).all()


@EVERY_UNARY
def test_not_a_number_stays_one(name):
    assert jnp.isnan(UNARY[name][0](jnp.array(jnp.nan)))


def test_gradient_of_relu_at_zero_is_zero():
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu))(jnp.array([-0.0, 0.0, 1.0, -1.0])), [0, 0, 1, 0])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (3, 11), (2, 16)])
def test_relu_keeps_a_bit_an_element_of_any_shape(shape):
    x = draw_normal(1, shape)
    y, pull = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(pull(3 * jnp.ones(shape))[0], 3.0 * (x > 0))


@EVERY
def test_empty_array_gives_an_empty_gradient(name):
    args = draw(name, (2, 0))
    y, pull = jax.vjp(PAIRS[name][0], *args)
    assert y.shape == (2, 0)
    assert all(g.shape == (2, 0) for g in pull(y))


def test_gate_and_up_keep_their_own_dtypes():
    gate, up = jnp.ones(3, jnp.bfloat16), jnp.ones(3)
    y, pull = jax.vjp(swiglu, gate, up)
    assert y.dtype == jnp.float32
    assert [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32]


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gelu(jnp.ones(3), "False"), TypeError, "gelu: approximate is 'False'"),
        (lambda: relu(jnp.arange(3)), TypeError, "relu: x is of dtype int32"),
        (lambda: gelu(jnp.ones(3, jnp.complex64)), TypeError, "gelu: x is of dtype complex64"),
        (lambda: geglu(jnp.ones(3), jnp.arange(3)), TypeError, "geglu: up is of dtype int32"),
        (lambda: swiglu(jnp.ones((2, 3)), jnp.ones(3)), ValueError, r"swiglu: gate has shape \(2, 3\) and up \(3,\), but both must have the same"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Memory


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@EVERY
def test_nothing_is_saved_but_the_inputs(name, dtype):
    args = tuple(a.astype(dtype) for a in draw(name, (64, 48)))
    kept = saved_bytes(PAIRS[name][0], *args)
    assert kept == (64 * 48 // 8 - args[0].nbytes if name == "relu" else 0)


@pytest.mark.parametrize(("scanned", "ratio"), [(False, 0.9), (True, 0.7)])
@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "swiglu"])
def test_stack_of_linear_maps_and_activations_takes_less_memory(name, scanned, ratio):
    """The recomputation survives XLA in stacks, unrolled and scanned."""
    ways = 2 if name in GATES else 1
    depth, rows, features = 8, 1024, 64
    x = jax.ShapeDtypeStruct((rows, features), jnp.float32)
    kernels = jax.ShapeDtypeStruct((depth, ways + 1, features, features), jnp.float32)

    def gradient(fn):
        step = lambda h, k: (h + fn(*(h @ k[i] for i in range(ways))) @ k[ways], None)

        def run(x, kernels):
            if scanned:
                return jax.lax.scan(step, x, kernels)[0].sum()
            for k in kernels:
                x, _ = step(x, k)
            return x.sum()

        return jax.grad(run, argnums=(0, 1))

    ours, theirs = (temp_bytes(gradient(fn), x, kernels) for fn in PAIRS[name])
    assert ours <= ratio * theirs
