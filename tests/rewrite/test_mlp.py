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


@case("", x, rnd(32, 64), rnd(32, 64), rnd(64, 32))
def leaky_gate(x, g, u, d):
    g = x @ g
    return (jax.nn.leaky_relu(g) * (x @ u)) @ d


@pytest.mark.parametrize("name", CASES)
def test_part_is_replaced_where_it_fits_and_nothing_changes(name, everything_pays):
    fn, expected, args = CASES[name]
    assert replaced(fn, *args) == expected.split()
    assert_same(fn, args) if expected else assert_same_value(fn, args)
