"""Products keep what their operands are made from, where that is alive anyway or smaller."""

import jax
import jax.numpy as jnp
import pytest

import layers
from tests.rewrite.support import assert_same, replaced
from tests.support import assert_trees_close, temp_bytes

keys = iter(jax.random.split(jax.random.key(0), 200))
CASES = {}


def case(expected, *args):
    def add(fn):
        CASES[fn.__name__] = fn, expected, args
        return fn

    return add


def rnd(*shape, dtype=jnp.float32):
    return jax.random.normal(next(keys), shape).astype(dtype)


x, w, u = rnd(6, 64), rnd(64, 32) / 8, rnd(64, 32) / 8


@case("product", x, w)
def cast_weights(x, w):
    return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)


@case("product", x, w)
def transposed_weights(x, w):
    return x @ jnp.swapaxes(w.reshape(64, 2, 16), 1, 2).reshape(64, 32)


@case("product", x, w, u)
def function_of_a_product(x, w, u):
    h = x @ w
    return (jnp.sin(h) * jnp.exp(-h)) @ u.T


@case("product product", x, w, u)
def operand_of_two_products(x, w, u):
    h = x.astype(jnp.bfloat16)
    return (h @ w.astype(jnp.bfloat16)) * (h @ u.astype(jnp.bfloat16))


@case("product", rnd(2, 8, 8, 3), rnd(3, 3, 3, 5))
def convolution(x, w):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(jnp.square(x), jnp.exp(w), (1, 1), "SAME", dimension_numbers=dimensions)


@case("product", rnd(4, 6, 8), rnd(4, 8, 5))
def a_kernel_for_each_element(x, w):
    return jax.vmap(jnp.dot)(x, jnp.sin(w))


@case("", x, w)
def operands_as_they_are(x, w):
    return x @ w


@case("", rnd(2, 3, 64), w)
def operand_that_lies_where_its_argument_does(x, w):
    return x.reshape(6, 64) @ w


@case("", x, w, rnd(32, 64))
def operand_of_the_same_size(x, w, u):
    return ((x @ w) * 2) @ u


@case("", x, w, rnd(32, 64))
def operand_that_something_else_keeps(x, w, u):
    h = jnp.tanh(x @ w)
    return h @ u, h * h


@pytest.mark.parametrize("name", CASES)
def test_operand_is_made_again_where_that_saves_bytes(name):
    fn, expected, args = CASES[name]
    assert [n for n in replaced(fn, *args) if n == "product"] == expected.split()
    if expected:
        assert layers.residuals(layers.rewrite(fn), *args).extra < layers.residuals(fn, *args).extra
        assert_same(fn, args, rtol=2e-2 if "bf16" in str(jax.make_jaxpr(fn)(*args)) else None)


def test_cast_of_a_weight_is_not_kept():
    def fn(x, w):
        return (x @ w.astype(jnp.bfloat16)).sum()

    x = rnd(6, 64, dtype=jnp.bfloat16)
    assert layers.residuals(layers.rewrite(fn), x, w).extra == 0
    assert layers.residuals(fn, x, w).extra == w.size * 2


def test_second_derivatives_and_loops():
    def fn(x, w):
        return jnp.tanh((jnp.sin(x @ w) * jnp.exp(x @ w)) @ w.T)

    def ways(f, x, w):
        total = lambda x, w: (f(x, w) ** 2).sum()
        looped = lambda w: jax.lax.scan(lambda c, _: (f(c, w), None), x, length=3)[0].sum()
        return jax.hessian(total)(x, w), jax.grad(looped)(w), jax.grad(jax.checkpoint(total), 1)(x, w), jax.jvp(looped, (w,), (w,))

    with jax.enable_x64():
        x, w = rnd(3, 5, dtype=jnp.float64), rnd(5, 4, dtype=jnp.float64)
        plain, new = jax.jit(lambda: (ways(fn, x, w), ways(layers.rewrite(fn), x, w)))()
    assert_trees_close(new, plain, rtol=1e-9, atol=1e-9)


def test_signs_of_zero_and_what_is_not_finite_are_the_same():
    def fn(x, w):
        return jnp.sum((1 / jnp.square(x)) @ w)

    x = jnp.array([[0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 2.0]])
    args = x, rnd(6, 3)
    plain, new = (jax.jit(jax.grad(f, (0, 1)))(*args) for f in (fn, layers.rewrite(fn)))
    assert_trees_close(new, plain, rtol=1e-6)


def test_stack_takes_less_memory_than_one_that_keeps_operands():
    def fn(x, w, u):
        for _ in range(10):
            h = x @ w
            x = x + (jnp.sin(h) * jnp.exp(-h * h) + jnp.tanh(h * h)) @ u
        return x.sum()

    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 32), (32, 256), (256, 32))]
    taken = [temp_bytes(jax.grad(f, (1, 2)), *args) for f in (layers.rewrite(fn), layers.rewrite(fn, skip="product"), fn)]
    assert taken[0] < 0.9 * taken[1] < 0.9 * taken[2]
