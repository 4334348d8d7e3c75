"""Groups of elementwise operations keep the cheapest values among theirs, and compute the others again."""

import jax
import jax.numpy as jnp
import pytest

import layers
from layers.rewriting.elementwise import groups_of
from layers.rewriting.reading import read
from tests.rewrite.support import assert_same, replaced
from tests.support import assert_trees_close, saved_bytes, temp_bytes

CASES = {}
keys = iter(jax.random.split(jax.random.key(0), 200))


def case(expected, kept, *args):
    """A function that is to become the rules `expected`, and then keeps `kept` times the bytes of its first argument beside its arguments."""

    def add(fn):
        CASES[fn.__name__] = fn, expected, kept, args
        return fn

    return add


def rnd(*shape, dtype=jnp.float32):
    return jax.random.normal(next(keys), shape).astype(dtype)


x, y, w = rnd(6, 64), rnd(6, 64), rnd(64, 64) / 8


@case("elementwise", 0, x)
def of_an_argument(x):
    return jnp.sin(x) * jnp.exp(-x * x)


@case("elementwise", 1, x, w)
def of_a_product(x, w):
    h = x @ w
    return jnp.sin(h) * jnp.exp(-h * h)


@case("elementwise", 2, x, w, rnd(64, 64))
def gate_of_two_products(x, w, u):
    g, h = x @ w, x @ u
    return jax.nn.sigmoid(g) * jnp.tanh(h) + jnp.square(h) * g


@case("elementwise", 1, x, w)
def with_a_result_that_is_kept_anyway(x, w):
    h = jnp.exp(jnp.cos(x @ w)) - 1
    return jnp.log1p(h * h) * h


@case("elementwise elementwise product", 1, x, w)
def around_a_product(x, w):
    h = jnp.sin(x) * jnp.cos(x) + x
    h = h @ w
    return jnp.sin(h) * jnp.exp(h)


@case("elementwise", 1.25, x, w, jax.random.key(3))
def with_a_mask(x, w, key):
    h = x @ w
    return jnp.where(jax.random.bernoulli(key, 0.7, h.shape), jnp.sin(h) * jnp.cos(h) / 0.7, 0)


@case("elementwise", 1, x, w, rnd(64))
def with_broadcasts(x, w, b):
    h = x @ w
    return (jnp.sin(h + b) * b * jnp.exp(b))[:, None] * jnp.cos(h)[:, :, None].reshape(6, 1, 64)


@case("elementwise", 1, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
def in_wider_numbers(x, w):
    h = (x @ w).astype(jnp.float32)
    return (jnp.sin(h) * jnp.exp(-h * h)).astype(jnp.bfloat16)


@case("elementwise", 1, x, w)
def through_parts_and_layouts(x, w):
    a, b = jnp.split((x @ w).reshape(6, 2, 32).transpose(1, 0, 2), 2)
    return jnp.concatenate([jnp.sin(a) * jnp.exp(b), jnp.cos(b) * jnp.exp(-a)], -1)


@case("elementwise", 1, x, w)
def rules_of_jax(x, w):
    h = x @ w
    return jax.nn.relu(h) * jax.nn.selu(h) + jax.nn.relu6(jnp.sin(h)) * h


@case("", 2, x, w)
def linear(x, w):
    return (x @ w) * 3 - x


@pytest.mark.parametrize("name", CASES)
def test_group_keeps_the_cheapest_values(name):
    fn, expected, kept, args = CASES[name]
    floats = [a for a in args if jnp.issubdtype(a.dtype, jnp.floating)]
    rest = args[len(floats) :]
    assert replaced(fn, *args) == expected.split()
    if expected:
        assert saved_bytes(lambda *a: layers.rewrite(fn)(*a, *rest), *floats) <= kept * x.size * floats[0].dtype.itemsize + 64
    if not rest:
        assert_same(fn, args)


def test_group_is_differentiated_twice_and_under_loops():
    def fn(x):
        h = jnp.sin(x @ x.T) @ x * jnp.exp(-x)
        return (jnp.tanh(h) * h).sum()

    def ways(f, x, y):
        looped = lambda x: jax.lax.scan(lambda c, _: (c + 0.1 * jax.grad(f)(c), f(c)), x, length=3)
        return jax.hessian(f)(x[:1]), jax.jvp(jax.grad(f), (x,), (y,)), jax.grad(lambda x: looped(x)[1].sum())(x), jax.grad(jax.checkpoint(f))(x)

    with jax.enable_x64():
        x, y = rnd(3, 8, dtype=jnp.float64), rnd(3, 8, dtype=jnp.float64)
        plain, new = jax.jit(lambda: (ways(fn, x, y), ways(layers.rewrite(fn), x, y)))()
    assert_trees_close(new, plain, rtol=1e-10, atol=1e-10)


def test_only_what_is_differentiated_is_kept():
    fn = layers.rewrite(lambda x, y: jnp.sin(x) * jnp.exp(y @ w))
    of_x, of_y = (saved_bytes(f, a) for f, a in ((lambda x: fn(x, y), x), (lambda y: fn(x, y), y)))
    assert of_x <= x.size * 4 and of_y <= x.size * 4 + w.size * 4


def test_what_a_loop_carries_is_no_argument():
    """A group in the body of a scan keeps one value a step."""

    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) * jnp.cos(c) * jnp.exp(-c * c), None), x, length=8)[0]

    kept = [saved_bytes(f, x) for f in (fn, layers.rewrite(fn))]
    assert kept[1] <= 8 * x.size * 4 < kept[0]


def test_group_takes_less_memory_than_autodiff():
    def fn(x, w):
        for _ in range(4):
            h = x @ w
            x = jnp.sin(h) * jnp.exp(-h * h) + jnp.tanh(h * h)
        return x.sum()

    args = jax.ShapeDtypeStruct((256, 64), jnp.float32), w
    assert temp_bytes(jax.grad(layers.rewrite(fn), 1), *args) < 0.7 * temp_bytes(jax.grad(fn, 1), *args)


def test_no_way_leaves_a_group_and_comes_back():
    def fn(x):
        a = jnp.sin(x)
        b = jnp.cos(a @ w)
        return a * b + jnp.exp(a)

    traced = jax.make_jaxpr(fn)(x)
    graph = read(traced.jaxpr, traced.consts)
    groups = sorted(sorted(n.name for n in g) for g in groups_of(graph, []))
    assert groups == [["add", "cos", "exp", "mul"], ["sin"]]
