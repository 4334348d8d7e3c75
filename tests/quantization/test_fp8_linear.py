"""The 8-bit floating-point linear layer against a float64 model of its rounding, and against the exact product; memory, edge cases, the module."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import layers
from layers.quantization.fp8_linear import Fp8Linear, fp8_linear
from layers.quantization.narrow_floats import E4M3, E5M2, narrow_product, rounded
from tests.support import assert_trees_close, saved_bytes, temp_bytes

X, KERNEL, BIAS, DY = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(50, 40), (40, 7), (7,), (50, 7)]))
SCALINGS = pytest.mark.parametrize("scaling", ["tensor", "channel"])


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Rounding


@pytest.mark.parametrize(("to", "kind"), [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)], ids=["E4M3", "E5M2"])
def test_rounding_is_to_the_nearest_once(to, kind):
    """Every number of the format, all midpoints, and their neighbours in float32: what rounds twice takes some of these to the wrong side."""
    numbers = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    u = np.concatenate([numbers, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))])
    np.testing.assert_array_equal(np.asarray(jax.jit(partial(rounded, to=to))(u)).astype(np.float32), u.astype(kind).astype(np.float32))


def test_what_is_larger_than_the_largest_becomes_that_and_nan_stays():
    for to in (E4M3, E5M2):
        given = rounded(jnp.array([1e30, -jnp.inf, jnp.nan]), to).astype(jnp.float32)
        np.testing.assert_array_equal(given, [to.largest, -to.largest, jnp.nan])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_exact_numbers(dtype):
    a, b = rounded(100 * X, E4M3), rounded(100 * DY, E5M2)
    exact = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    np.testing.assert_allclose(np.asarray(narrow_product(a, b, (0, 0), dtype), np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=0.1)


# Values and gradients against the model


def narrowed(a, kind, axis):
    """`a` in float64, rounded to 8 bits with a scale for all of it or along an axis."""
    a = np.asarray(a, np.float64)
    scale = np.abs(a).max(axis, keepdims=True) / float(ml_dtypes.finfo(kind).max)
    return (a / scale).astype(np.float32).astype(kind).astype(np.float64) * scale


def model(x, kernel, bias, dy, scaling):
    """The output and the gradients of x, kernel and bias."""
    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    if scaling == "tensor":
        x, kernel, g = narrowed(x, e4m3, None), narrowed(kernel, e4m3, None), narrowed(dy, e5m2, None)
        return x @ kernel + bias, g @ kernel.T, x.T @ g, dy.sum(0)
    sx, sw = (np.abs(np.asarray(a, np.float64)).max(i, keepdims=True) / 448 for a, i in ((x, 1), (kernel, 0)))
    x, kernel = narrowed(x, e4m3, 1), narrowed(kernel, e4m3, 0)
    dx = narrowed(dy * sw, e5m2, 1) @ (kernel / sw).T
    return x @ kernel + bias, dx, (x / sx).T @ narrowed(dy * sx, e5m2, 0), dy.sum(0)


@SCALINGS
def test_values_and_gradients_are_those_of_the_model_of_the_rounding(scaling):
    y, pull = jax.vjp(partial(fp8_linear, scaling=scaling), X, KERNEL, BIAS)
    for ours, theirs in zip((y, *pull(DY)), model(*(np.asarray(a, np.float64) for a in (X, KERNEL, BIAS, DY)), scaling), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@SCALINGS
def test_error_is_that_of_three_and_of_two_bits(scaling):
    y, pull = jax.vjp(partial(fp8_linear, scaling=scaling), X, KERNEL, BIAS)
    dx, dkernel, dbias = pull(DY)
    assert relative(y, X @ KERNEL + BIAS) < 0.045
    assert relative(dx, DY @ KERNEL.T) < 0.08 and relative(dkernel, X.T @ DY) < 0.08
    np.testing.assert_allclose(dbias, DY.sum(0), rtol=1e-6)


def test_channels_of_very_different_size_are_as_exact_as_others():
    wild = X * 10.0 ** jnp.linspace(-6, 6, 50)[:, None]
    error = lambda scaling: np.abs(np.asarray(fp8_linear(wild, KERNEL, scaling=scaling) / (wild @ KERNEL)) - 1).mean(-1)
    assert np.median(error("channel")) < 0.1 < np.median(error("tensor"))


@SCALINGS
def test_gradient_without_rounding_is_that_of_the_rounded_operands(scaling):
    dx, dkernel = jax.vjp(partial(fp8_linear, scaling=scaling, gradient_rounding="none"), X, KERNEL)[1](DY)
    axes = (1, 0) if scaling == "channel" else (None, None)
    x, kernel = (narrowed(a, ml_dtypes.float8_e4m3fn, axis) for a, axis in zip((X, KERNEL), axes, strict=True))
    np.testing.assert_allclose(dx, DY @ kernel.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel, x.T @ DY, rtol=1e-4, atol=1e-4)


# Edge cases and memory


@pytest.mark.parametrize("size", [3e38, 1e20, 1e-20])
@SCALINGS
def test_numbers_of_any_size_are_as_exact(size, scaling):
    y, pull = jax.vjp(partial(fp8_linear, scaling=scaling), jnp.float32(size) * jnp.clip(X, -1, 1), KERNEL / 100)
    assert relative(np.asarray(y, np.float64) / size, jnp.clip(X, -1, 1) @ KERNEL / 100) < 0.05
    assert all(jnp.isfinite(g).all() for g in pull(DY / 1e3))


@SCALINGS
def test_zeros_and_no_rows_are_finite(scaling):
    for x in (jnp.zeros((3, 40)), jnp.zeros((0, 40)), X.at[1].set(0)):
        y, pull = jax.vjp(partial(fp8_linear, scaling=scaling), x, KERNEL, BIAS)
        assert y.shape == (len(x), 7) and jnp.isfinite(y).all()
        assert all(jnp.isfinite(g).all() for g in pull(jnp.zeros_like(y)))


@SCALINGS
def test_what_is_not_a_number_shows(scaling):
    assert not jnp.isfinite(fp8_linear(X.at[1, 2].set(jnp.nan), KERNEL, scaling=scaling)[1]).any()


def test_one_byte_an_entry_is_saved():
    x = jnp.zeros((256, 128))
    kernel = jnp.zeros((128, 64))
    assert saved_bytes(fp8_linear, x, kernel) + x.nbytes + kernel.nbytes <= x.size + kernel.size + 8


def test_memory_is_that_of_the_8_bit_operands_and_one_wide_copy():
    x, kernel = jnp.zeros((512, 256)), jnp.zeros((256, 512))
    step = lambda x, kernel: jax.vjp(fp8_linear, x, kernel)[1](jnp.ones((512, 512)))
    assert temp_bytes(step, x, kernel) <= 4 * (x.nbytes + kernel.nbytes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype(dtype):
    y, pull = jax.vjp(fp8_linear, X.astype(dtype), KERNEL.astype(dtype))
    assert y.dtype == dtype and relative(y, X @ KERNEL) < 0.05
    assert [g.dtype for g in pull(y)] == [dtype, dtype]


def test_leading_axes_are_rows():
    np.testing.assert_array_equal(fp8_linear(X.reshape(5, 10, 40), KERNEL), fp8_linear(X, KERNEL).reshape(5, 10, 7))


# The module


def test_module_holds_and_nearly_computes_what_that_of_flax_does():
    ours, theirs = Fp8Linear(40, 7, rngs=nnx.Rngs(0)), nnx.Linear(40, 7, rngs=nnx.Rngs(0))
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)), rtol=0)
    assert relative(ours(X), theirs(X)) < 0.045
    assert Fp8Linear(40, 7, dtype=jnp.bfloat16, use_bias=False, scaling="channel", rngs=nnx.Rngs(0))(X).dtype == jnp.bfloat16


class Model(nnx.Module):
    def __init__(self, rngs):
        self.fits = nnx.Linear(32, 16, rngs=rngs)
        self.odd = nnx.Linear(16, 7, rngs=rngs)
        self.precise = nnx.Linear(16, 16, precision="highest", rngs=rngs)
        self.ours = layers.Linear(16, 32, rngs=rngs)

    def __call__(self, x):
        return self.odd(self.precise(self.fits(x)))


def test_swap_puts_it_where_sizes_and_options_allow_it():
    model, x = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (20, 32))
    before = model(x)
    report = layers.swap(model, fp8=True)
    assert [type(m) for m in (model.fits, model.odd, model.precise, model.ours)] == [Fp8Linear, layers.Linear, nnx.Linear, Fp8Linear]
    assert "fits: Linear -> layers.Fp8Linear" in str(report)
    assert 0 < relative(model(x), before) < 0.06


BAD = [
    ((X, KERNEL.T), {}, ValueError, r"kernel has shape \(7, 40\)"),
    ((X, KERNEL, BIAS[1:]), {}, ValueError, r"bias has shape \(6,\)"),
    ((X, KERNEL), {"scaling": "block"}, ValueError, "scaling is 'block', but must be one of 'tensor', 'channel'"),
    ((X, KERNEL), {"gradient_rounding": "up"}, ValueError, "gradient_rounding is 'up'"),
    ((X.astype(int), KERNEL), {}, TypeError, "x is of dtype int32"),
    ((X, KERNEL * 1j), {}, TypeError, "kernel is of dtype complex64"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input_is_an_error(args, options, error, message):
    with pytest.raises(error, match="^fp8_linear: .*" + message):
        fp8_linear(*args, **options)
