"""Norms as people write them are found."""

import jax
import jax.numpy as jnp
import pytest

from tests.rewrite.support import assert_same, assert_same_value, reasons, replaced

CASES = {}
keys = iter(jax.random.split(jax.random.key(0), 200))


def case(expected, *args):
    def add(fn):
        CASES[fn.__name__] = fn, expected, args
        return fn

    return add


def rnd(*shape, dtype=jnp.float32):
    return jax.random.normal(next(keys), shape).astype(dtype)


x, w, b = rnd(3, 7, 32), rnd(32), rnd(32)


def rms(x, e=1e-6):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + e)


@case("rms_norm", x, w)
def rms_plain(x, w):
    return rms(x) * w


@case("rms_norm", x, w)
def rms_gemma(x, w):
    return rms(x) * (1 + w)


@case("rms_norm", x, w)
def rms_sqrt(x, w):
    return w * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


@case("rms_norm", x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
def rms_bf16(x, w):
    return rms(x.astype(jnp.float32)).astype(x.dtype) * w


@case("rms_norm", x)
def rms_no_scale(x):
    return rms(x)


@case("layer_norm", x, w, b)
def ln_var(x, w, b):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


@case("layer_norm", x, w, b)
def ln_standardize(x, w, b):
    return jax.nn.standardize(x) * w + b


@case("layer_norm", x)
def ln_bare(x):
    m = x.mean(-1, keepdims=True)
    return (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-5)


@case("rms_norm", x, w)
def rms_other_axis(x, w):
    return x * jax.lax.rsqrt((x * x).mean(1, keepdims=True) + 1e-6) * w


@case("", x, w)
def rms_other_array(x, w):
    return (x + 1) * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


@case("", x, w)
def rms_sum(x, w):
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6) * w


@case("", x, w)
def rms_statistic_read(x, w):
    r = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * r * w, r


@case("", x, w)
def rms_cubed(x, w):
    return x * jax.lax.rsqrt((x**3).mean(-1, keepdims=True) ** 2 + 1e-6) * w


@case("", rnd(7, 7))
def rms_square_shuffled(x):
    return x * jax.lax.rsqrt((x * x).mean(-1) + 1e-6)[None, :]


@case("layer_norm", rnd(2, 3, 4, 5), rnd(4, 5), rnd(4, 5))
def ln_over_two_axes(x, w, b):
    m = x.mean((-2, -1), keepdims=True)
    v = ((x - m) ** 2).mean((-2, -1), keepdims=True)
    return (x - m) * jax.lax.rsqrt(v + 1e-5) * w + b


@case("layer_norm", rnd(2, 5, 3), rnd(5), rnd(5))
def ln_over_the_middle_axis(x, w, b):
    m, v = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    return (x - m) / jnp.sqrt(v + 1e-5) * w[:, None] + b[:, None]


@case("layer_norm", x, w, b)
def ln_of_moments(x, w, b):
    m = x.mean(-1, keepdims=True)
    v = (x * x).mean(-1, keepdims=True) - m * m
    return (x - m) * (jax.lax.rsqrt(v + 1e-5) * w) + b


@case("", x, w)
def epsilon_inside_the_mean(x, w):
    return x * jax.lax.rsqrt((x * x + 1e-6).mean(-1, keepdims=True)) * w


@case("rms_norm", rnd(7, 7))
def mean_of_columns_subtracted(x):
    m = x.mean(-1)
    d = x - m[None, :]
    return d * jax.lax.rsqrt((d * d).mean(-1, keepdims=True) + 1e-6) - x


@case("layer_norm", rnd(2, 3, 8), rnd(8))
def ln_vmapped(x, w):
    one = lambda x: (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-5) * w
    return jax.vmap(jax.vmap(one))(x)


@case("rms_norm", x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
def rms_of_widened_squares(x, w):
    variance = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True).astype(x.dtype)
    return w * (x / jnp.sqrt(variance + 1e-6))


@pytest.mark.parametrize("name", CASES)
def test_part_is_replaced_where_it_fits_and_nothing_changes(name, everything_pays):
    fn, expected, args = CASES[name]
    assert replaced(fn, *args, skip="elementwise") == expected.split()
    assert_same(fn, args) if expected else assert_same_value(fn, args)


def test_epsilon_inside_the_mean_is_reported():
    assert reasons(epsilon_inside_the_mean, x, w) == ["epsilon is added inside the mean, to each number"]
