"""Perceptrons as people write them are found."""

import jax
import jax.numpy as jnp
import pytest

from tests.rewrite.support import assert_same, assert_same_value, replaced

CASES = {}
keys = iter(jax.random.split(jax.random.key(0), 200))


def case(expected, *args):
    def add(fn):
        CASES[fn.__name__] = fn, expected, args
        return fn

    return add


def rnd(*shape, dtype=jnp.float32):
    return jax.random.normal(next(keys), shape).astype(dtype)


x = rnd(3, 7, 32)


@case("gated_mlp", x, rnd(32, 64), rnd(32, 64), rnd(64, 32))
def swiglu(x, g, u, d):
    return (jax.nn.silu(x @ g) * (x @ u)) @ d


@case("mlp", x, rnd(32, 64), rnd(64), rnd(64, 32), rnd(32))
def relu_mlp(x, u, c, d, e):
    return jax.nn.relu(x @ u + c) @ d + e


@case("swiglu", x, rnd(32, 64), rnd(32, 64), rnd(64, 32))
def gate_read_twice(x, g, u, d):
    g = x @ g
    return (jax.nn.silu(g) * (x @ u)) @ d, g


@case("elementwise", x, rnd(32, 64), rnd(32, 64), rnd(64, 32))
def leaky_gate(x, g, u, d):
    g = x @ g
    return (jax.nn.leaky_relu(g) * (x @ u)) @ d


def exact_gelu(x):
    return 0.5 * x * (1 + jax.lax.erf(x / 1.4142135))


def tanh_gelu(x):
    return x * 0.5 * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (x + 0.044715 * jnp.power(x, 3))))


def swish(x):
    return x / (1 + jnp.exp(-x))


@case("mlp", x, rnd(32, 64), rnd(64, 32))
def gelu_by_erf(x, u, d):
    return exact_gelu(x @ u) @ d


@case("mlp", x, rnd(32, 64), rnd(64), rnd(64, 32))
def gelu_by_tanh(x, u, c, d):
    return tanh_gelu(x @ u + c) @ d


@case("gated_mlp", x, rnd(32, 64), rnd(32, 64), rnd(64, 32))
def swish_by_exp(x, g, u, d):
    return ((x @ u) * swish(x @ g)) @ d


@case("mlp", rnd(5, 32), rnd(64, 32), rnd(64), rnd(32, 64), rnd(32))
def vmapped_rows(x, u, c, d, e):
    return jax.vmap(lambda x: d @ jax.nn.gelu(u @ x + c) + e)(x)


@case("mlp", rnd(2, 9, 32), rnd(9, 20), rnd(20, 9))
def over_tokens(x, u, d):
    return (jax.nn.gelu(x.mT @ u) @ d).mT


@case("mlp", x.astype(jnp.bfloat16), rnd(32, 64).astype(jnp.bfloat16), rnd(64, 32).astype(jnp.bfloat16))
def bfloat16(x, u, d):
    return jax.nn.gelu(x @ u) @ d


@case("elementwise", x, rnd(32, 64), rnd(64, 32))
def gelu_of_another_factor(x, u, d):
    h = x @ u
    return (h * jax.nn.sigmoid(1.702 * h)) @ d


@case("swiglu", x, rnd(32, 64), rnd(32, 64), rnd(64, 32))
def hidden_layer_kept(x, g, u, d):
    h = jax.nn.silu(x @ g) * (x @ u)
    return h @ d, h


@pytest.mark.parametrize("name", CASES)
def test_part_is_replaced_where_it_fits_and_nothing_changes(name, everything_pays):
    fn, expected, args = CASES[name]
    assert replaced(fn, *args, skip="product") == expected.split()
    assert_same(fn, args) if expected else assert_same_value(fn, args)
