"""The 8-bit linear layer against its integers in NumPy, its errors, its memory, every transformation."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import layers
from layers.quantization.int8_linear import Int8Linear, int8_linear
from tests.support import assert_trees_close, saved_bytes

module = importlib.import_module("layers.quantization.int8_linear")


def draw(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


X, KERNEL, BIAS, DY = draw(0, 12, 40), draw(1, 40, 7), draw(2, 7), draw(3, 12, 7)


def quantized(a, axis):
    """Integers and scales by hand, in float64."""
    scale = np.abs(a).max(axis, keepdims=True) / 127
    return np.round(a / scale), scale


def dequantized(a, axis):
    q, scale = quantized(np.asarray(a, np.float64), axis)
    return q * scale


def by_hand(x, kernel, bias, dy):
    (qx, sx), (qw, sw) = quantized(x, 1), quantized(kernel, 0)
    qg, sg = quantized(dy * sw, 1)
    qh, sh = quantized(dy * sx, 0)
    return sx * sw * (qx @ qw) + bias, (sg * (qg @ qw.T), sh * (qx.T @ qh), dy.sum(0))


def both(x, kernel, bias, dy, **options):
    y, pull = jax.vjp(lambda *a: int8_linear(*a, **options), x, kernel, bias)
    return y, pull(dy)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_values_and_gradients_are_those_of_the_integers_by_hand():
    with jax.enable_x64(True):
        args = [jnp.asarray(a, jnp.float64) for a in (X, KERNEL, BIAS, DY)]
        assert_trees_close(jax.jit(both)(*args), by_hand(*map(np.asarray, args)), rtol=1e-10, atol=1e-12)


def test_without_rounding_the_gradient_is_that_of_the_dequantised_product():
    with jax.enable_x64(True):
        args = [jnp.asarray(a, jnp.float64) for a in (X, KERNEL, BIAS, DY)]
        x, kernel = dequantized(args[0], 1), dequantized(args[1], 0)
        expected = (np.asarray(args[3]) @ kernel.T, x.T @ np.asarray(args[3]), np.asarray(args[3]).sum(0))
        assert_trees_close(both(*args, gradient_rounding="none")[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rounding", "limit"), [("nearest", 0.015), ("stochastic", 0.02), ("none", 0.012)])
def test_errors_are_about_a_percent(dtype, rounding, limit):
    x, kernel, dy = draw(0, 256, 128, dtype=dtype), draw(1, 128, 64, dtype=dtype), draw(2, 256, 64, dtype=dtype)
    key = jax.random.key(5) if rounding == "stochastic" else None
    run = jax.jit(lambda x, kernel, dy: jax.vjp(lambda *a: int8_linear(*a, gradient_rounding=rounding, key=key), x, kernel)[1](dy))
    dx, dkernel = run(x, kernel, dy)
    assert dx.dtype == dkernel.dtype == int8_linear(x, kernel).dtype == dtype
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    assert relative(int8_linear(x, kernel), x @ kernel) < 0.012
    assert relative(dx, dy @ kernel.T) < limit
    assert relative(dkernel, x.T @ dy) < limit


def test_rounding_at_random_is_right_in_the_mean():
    keys = jax.random.split(jax.random.key(0), 1000)
    grads = jax.jit(jax.vmap(lambda key: both(X, KERNEL, BIAS, DY, gradient_rounding="stochastic", key=key)[1]))(keys)
    exact = both(X, KERNEL, BIAS, DY, gradient_rounding="none")[1]
    nearest = both(X, KERNEL, BIAS, DY)[1]
    for g, e, n in zip(grads[:2], exact[:2], nearest[:2], strict=True):
        assert relative(g.mean(0), e) < 0.15 * relative(n, e)


def test_rounding_at_random_is_a_function_of_the_key():
    one, again, other = (both(X, KERNEL, BIAS, DY, gradient_rounding="stochastic", key=jax.random.key(i))[1][0] for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_backward_keeps_one_byte_an_entry():
    x, kernel, bias = jnp.ones((64, 512)), jnp.ones((512, 256)), jnp.ones(256)
    kept = saved_bytes(int8_linear, x, kernel, bias) + x.nbytes + kernel.nbytes + bias.nbytes
    assert kept == x.size + kernel.size + 4 * (64 + 256)


def test_a_sum_that_an_int32_cannot_hold_is_right():
    terms = 140_000
    y = int8_linear(jnp.ones((1, terms)), jnp.ones((terms, 1)))
    assert 127 * 127 * terms > 2**31
    np.testing.assert_allclose(y, [[terms]], rtol=1e-6)


def test_zero_rows_and_columns_are_finite():
    x, kernel, dy = X.at[1].set(0), KERNEL.at[:, 2].set(0), DY.at[3].set(0).at[:, 4].set(0)
    y, grads = both(x, kernel, BIAS, dy)
    np.testing.assert_array_equal(y[1], BIAS)
    np.testing.assert_array_equal(y[:, 2], jnp.full(12, BIAS[2]))
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[0][3], jnp.zeros(40))
    np.testing.assert_array_equal(grads[1][:, 4], jnp.zeros(40))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)])
def test_any_leading_axes_and_none_of_them(shape):
    y, grads = both(jnp.ones(shape), KERNEL, BIAS, jnp.ones((*shape[:-1], 7)))
    assert y.shape == (*shape[:-1], 7)
    assert grads[0].shape == shape
    assert all(np.isfinite(g).all() for g in grads)


def test_no_features_give_the_bias():
    np.testing.assert_array_equal(int8_linear(jnp.ones((2, 0)), jnp.ones((0, 7)), BIAS), jnp.stack([BIAS, BIAS]))


def test_what_is_not_finite_stays_visible():
    y = int8_linear(X.at[0, 0].set(jnp.inf).at[1, 1].set(jnp.nan), KERNEL)
    assert not np.isfinite(y[:2]).any()
    assert np.isfinite(y[2:]).all()


# Every transformation of the rule with a rounded gradient, which no surrogate describes


def grads_of(x, kernel, bias):
    return jax.grad(lambda *a: (int8_linear(*a) * DY).sum(), (0, 1, 2))(x, kernel, bias)


EXPECTED = by_hand(*(np.asarray(a, np.float64) for a in (X, KERNEL, BIAS, DY)))[1]
TRANSFORMS = {
    "jit": jax.jit(grads_of),
    "remat": jax.jit(lambda *a: jax.grad(jax.checkpoint(lambda *a: (int8_linear(*a) * DY).sum()), (0, 1, 2))(*a)),
    "vmap": lambda *a: [g[1] for g in jax.jit(jax.vmap(grads_of))(*(jnp.stack([0 * x, x]) for x in a))],
    "scan": lambda *a: jax.jit(
        lambda *a: jax.grad(lambda *a: jax.lax.scan(lambda c, _: (c + (int8_linear(*a) * DY).sum() / 2, None), 0.0, None, 2)[0], (0, 1, 2))(*a)
    )(*a),
    "shard_map": jax.jit(jax.shard_map(grads_of, mesh=Mesh(np.array(jax.devices()[:2]), ("d",)), in_specs=P(), out_specs=P())),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradient_is_the_same_under(name):
    for given, expected in zip(TRANSFORMS[name](X, KERNEL, BIAS), EXPECTED, strict=True):
        assert relative(given, expected) < 2e-3


@pytest.mark.devices(2)
def test_rows_on_several_devices_have_their_own_scales_in_the_gradient_of_the_kernel():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    part = lambda x, dy, kernel, bias: (int8_linear(x, kernel, bias) * dy).sum()[None]
    run = jax.shard_map(part, mesh=mesh, in_specs=(P("d"), P("d"), P(), P()), out_specs=P("d"))
    given = jax.jit(jax.grad(lambda x, kernel: run(x, DY, kernel, BIAS).sum(), (0, 1)))(X, KERNEL)
    halves = [by_hand(*(np.asarray(a, np.float64) for a in (X[i], KERNEL, BIAS, DY[i])))[1] for i in (slice(0, 6), slice(6, 12))]
    assert relative(given[0], np.concatenate([h[0] for h in halves])) < 2e-3
    assert relative(given[1], halves[0][1] + halves[1][1]) < 2e-3


def test_forward_mode_is_that_of_the_dequantised_product():
    x, kernel = dequantized(X, 1), dequantized(KERNEL, 0)
    dots = draw(4, *X.shape), draw(5, *KERNEL.shape), draw(6, 7)
    given = jax.jvp(int8_linear, (X, KERNEL, BIAS), dots)[1]
    np.testing.assert_allclose(given, dots[0] @ kernel + x @ dots[1] + dots[2], rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused():
    with pytest.raises(RuntimeError, match="twice"):
        jax.grad(lambda x: jax.grad(lambda x: (int8_linear(x, KERNEL) ** 2).sum())(x).sum())(X)


# The module


def test_module_holds_and_computes_what_that_of_flax_does():
    ours, theirs = Int8Linear(40, 7, rngs=nnx.Rngs(0)), nnx.Linear(40, 7, rngs=nnx.Rngs(0))
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)), rtol=0)
    assert relative(ours(X), theirs(X)) < 0.012
    assert Int8Linear(40, 7, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0))(X).dtype == jnp.bfloat16


def test_module_rounds_at_random_with_a_key():
    layer = Int8Linear(40, 7, gradient_rounding="stochastic", rngs=nnx.Rngs(0))
    grads = [jax.grad(lambda x, i=i: (layer(x, key=jax.random.key(i)) * DY).sum())(X) for i in range(2)]
    assert (grads[0] != grads[1]).any()
    with pytest.raises(ValueError, match="takes a key"):
        layer(X)


BAD = [
    ((X, KERNEL.T), {}, ValueError, r"kernel has shape \(7, 40\)"),
    ((X, KERNEL, BIAS[1:]), {}, ValueError, r"bias has shape \(6,\), but must be \(out_features,\) = \(7,\)"),
    ((X, KERNEL), {"gradient_rounding": "up"}, ValueError, "gradient_rounding is 'up'"),
    ((X, KERNEL), {"gradient_rounding": "stochastic"}, ValueError, "takes a key"),
    ((X, KERNEL), {"key": jax.random.key(0)}, ValueError, "takes a key"),
    ((X.astype(int), KERNEL), {}, TypeError, "x is of dtype int32"),
    ((X, KERNEL, BIAS * 1j), {}, TypeError, "bias is of dtype complex64"),
    ((X, KERNEL), {"key": "abc", "gradient_rounding": "stochastic"}, TypeError, "key is 'abc'"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input_is_an_error(args, options, error, message):
    with pytest.raises(error, match="^int8_linear: .*" + message):
        int8_linear(*args, **options)


def test_an_int32_holds_the_sum_of_a_block_of_terms():
    assert 127 * 127 * module.MOST_TERMS < 2**31


@pytest.mark.parametrize("option", [{"precision": "highest"}, {"dot_general": jax.nn.relu}, {"preferred_element_type": jnp.float32}])
def test_option_of_a_floating_point_product_is_an_error(option):
    with pytest.raises(ValueError, match=f"Int8Linear: {next(iter(option))} is of no use"):
        Int8Linear(40, 7, **option, rngs=nnx.Rngs(0))


def test_defaults_of_those_options_are_accepted():
    Int8Linear(40, 7, precision=None, dot_general=jax.lax.dot_general, preferred_element_type=None, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_every_product_is_of_8_bit_integers_summed_in_32_bits(platform):
    x, kernel = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((16, 4), jnp.bfloat16)
    with layers.compiling_for(platform):
        text = str(jax.make_jaxpr(jax.value_and_grad(lambda x, w: int8_linear(x, w).astype(jnp.float32).sum(), (0, 1)))(x, kernel))
        lowered = jax.export.export(
            jax.jit(jax.value_and_grad(lambda x, w: int8_linear(x, w).astype(jnp.float32).sum(), (0, 1))), platforms=[platform]
        )(x, kernel)
    assert text.count("dot_general[") == text.count("preferred_element_type=int32") == 3
    products = [line for line in lowered.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3 and all(re.search(r"xi8>, tensor<\d+x\d+xi8>\) -> tensor<\d+x\d+xi32>", line) for line in products)
