"""Couplings of functions: closures, arguments, fixed point, edge cases and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.reversible.reversible_coupling import reversible_coupling
from tests.support import assert_trees_close


def draw(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def plain_coupling(f, g, x1, x2, *args, **_):
    y1 = x1 + f(x2, *args)
    return y1, x2 + g(y1, *args)


def arrays():
    return draw(0, (2, 4), jnp.float64), draw(1, (2, 3), jnp.float64), draw(2, (3, 4), jnp.float64), draw(3, (4, 3), jnp.float64)


def loss(ys):
    return sum(jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape)) for y in ys)


def closing(coupling, x1, x2, w, v):
    return coupling(lambda x: jnp.tanh(x @ w), lambda x: jnp.sin(x @ v), x1, x2)


def nested(coupling, x1, x2, w, v):
    product = lambda m: lambda x: x @ m
    inner, times_v = {"w": product(w)}, product(v)
    return coupling(lambda x: jnp.tanh(inner["w"](x)), lambda x, f=times_v: jnp.sin(f(x)), x1, x2)


def bound(coupling, x1, x2, w, v):
    return coupling(partial(lambda m, x: jnp.tanh(x @ m), w), partial(lambda x, m: jnp.sin(x @ m), m=v), x1, x2)


def given(coupling, x1, x2, w, v):
    return coupling(lambda x, m, _: jnp.tanh(x @ m["w"]), lambda x, _, m: jnp.sin(x @ m), x1, x2, {"w": w, "name": "static"}, v)


def module(coupling, x1, x2, w, v):
    f, g = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    f.kernel, g.kernel = nnx.Param(w), nnx.Param(v)
    return coupling(f, g, x1, x2)


def module_in_closure(coupling, x1, x2, w, v):
    f = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    f.kernel = nnx.Param(w)
    return coupling(lambda x: jnp.tanh(f(x)), lambda x: jnp.sin(x @ v), x1, x2)


@pytest.mark.parametrize("form", [closing, nested, bound, given, module, module_in_closure])
def test_arrays_that_functions_hold_get_the_gradients_of_autodiff_and_do_not_leak(form):
    with jax.enable_x64(True), jax.checking_leaks():
        run = lambda coupling: jax.jit(jax.value_and_grad(lambda *a: loss(form(coupling, *a)), (0, 1, 2, 3)))(*arrays())
        assert_trees_close(run(reversible_coupling), run(plain_coupling), rtol=1e-10, atol=1e-12)


def test_gradient_of_the_body_of_a_scan_whose_functions_close_over_the_carry():
    with jax.enable_x64(True):
        x1, x2, w, v = arrays()

        def run(coupling, w):
            def body(scale, _):
                y1, _ = coupling(lambda x: jnp.tanh(scale * x @ w), lambda x: x @ v, x1, x2)
                return y1.mean() + scale, None

            return jax.lax.scan(body, jnp.ones(()), None, length=3)[0]

        ours, theirs = (jax.jit(jax.value_and_grad(partial(run, c)))(w) for c in (reversible_coupling, plain_coupling))
        assert_trees_close(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("exact", [False, True])
def test_chain_of_functions_is_the_couplings_one_after_another(exact):
    with jax.enable_x64(True):
        x1, x2, w, v = arrays()

        def chain(x1, x2, w, v):
            fs = [lambda x, m, k=k: jnp.tanh(k * (x @ w)) + m for k in (1, 2, 3)]
            gs = [lambda x, m, k=k: jnp.sin(k * (x @ v)) for k in (1, 2, 3)]
            return fs, gs

        def ours(x1, x2, w, v, m):
            return loss(reversible_coupling(*chain(x1, x2, w, v), x1, x2, m, exact=exact))

        def theirs(x1, x2, w, v, m):
            for f, g in zip(*chain(x1, x2, w, v), strict=True):
                x1, x2 = plain_coupling(f, g, x1, x2, m)
            return loss((x1, x2))

        args = (x1, x2, w, v, draw(5, (4,), jnp.float64))
        both = [jax.jit(jax.value_and_grad(f, range(5)))(*args) for f in (ours, theirs)]
        assert_trees_close(*both, rtol=1e-10, atol=1e-12)


def test_module_with_dropout_draws_anew_in_each_call():
    drop, x = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones((4, 8))
    run = lambda: reversible_coupling(drop, jnp.tanh, x, x)[0]
    first, second = run(), run()
    assert (first != second).any()
    assert drop.rngs.count[...] == 2


def test_function_around_a_module_with_dropout_is_refused():
    drop, x = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones((4, 8))
    with pytest.raises(TypeError, match="give the module itself"):
        jax.grad(lambda x: reversible_coupling(lambda x: drop(x), jnp.tanh, x, x)[0].sum())(x)


# Fixed point


@pytest.mark.parametrize("growth", ["too large", "infinite", "not a number"])
def test_stream_that_leaves_the_range_gives_nan_and_never_a_wrong_number(growth):
    large = {"too large": 1e4, "infinite": jnp.inf, "not a number": jnp.nan}[growth]
    x = jnp.array([0.5, 1.0])
    run = lambda x: reversible_coupling(lambda x: large * x, jnp.tanh, x, x, exact=True)
    assert np.isnan(run(x)[0]).all()
    assert np.isnan(jax.grad(lambda x: run(x)[0].sum())(x)).all()


def test_headroom_widens_the_range():
    x = jnp.array([0.5, 1.0])
    y1, _ = reversible_coupling(lambda x: 1e4 * x, jnp.tanh, x, x, exact=True, headroom=2**15)
    np.testing.assert_allclose(y1, 10001 * x, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_range_follows_the_input(scale):
    x = scale * draw(0, (16,))
    y1, y2 = reversible_coupling(lambda x: 0.5 * x, lambda x: -x, x, 2 * x, exact=True)
    np.testing.assert_allclose(y1, 2 * x, rtol=1e-4, atol=1e-6 * scale)
    np.testing.assert_allclose(y2, jnp.zeros(16), atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_dtypes_of_outputs_and_gradients_are_those_of_the_inputs(dtype, exact):
    x, w = draw(0, (4, 3), dtype), draw(1, (3, 3), jnp.float32)
    y1, pull = jax.vjp(lambda x, w: reversible_coupling(lambda x: x @ w, jnp.tanh, x, x, exact=exact)[0], x, w)
    dx, dw = pull(y1)
    assert (y1.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)


def test_functions_get_the_dtype_of_the_input():
    seen = []
    x = draw(0, (4,), jnp.bfloat16)
    reversible_coupling(lambda x: seen.append(x.dtype) or x, lambda x: x, x, x)
    assert seen == [jnp.bfloat16]


# Edge cases and errors


def test_complex_streams_have_the_gradient_of_autodiff():
    x = (draw(0, (4,)) + 1j * draw(1, (4,))).astype(jnp.complex64)
    run = lambda coupling: jax.grad(lambda x: jnp.abs(coupling(jnp.sin, jnp.cos, x, 2 * x)[1]).sum())(x)
    np.testing.assert_allclose(run(reversible_coupling), run(plain_coupling), rtol=1e-5)


ONES = jnp.ones((2, 3))
WRONG = {
    "shape": (lambda: reversible_coupling(lambda x: x[:1], jnp.tanh, ONES, ONES), ValueError, r"f of coupling 0 returned float32\(1, 3\)"),
    "integers": (lambda: reversible_coupling(lambda x: x.astype(int), jnp.tanh, ONES, ONES), ValueError, "must return floats"),
    "tuple": (lambda: reversible_coupling(jnp.tanh, lambda x: (x, x), ONES, ONES), TypeError, "g of coupling 0 returned a tuple"),
    "no function": (lambda: reversible_coupling([3], [jnp.tanh], ONES, ONES), TypeError, "f of coupling 0 is a int"),
    "lengths": (lambda: reversible_coupling([jnp.tanh] * 2, [jnp.tanh], ONES, ONES), ValueError, "a sequence of 2 and g of 1"),
    "dtype": (lambda: reversible_coupling(jnp.tanh, jnp.tanh, ONES.astype(int), ONES), TypeError, "x1 is of dtype int32"),
    "dict": (lambda: reversible_coupling(jnp.tanh, jnp.tanh, ONES, {"a": ONES}), TypeError, "x2 is a dict, but must be one array"),
    "stream dtype": (lambda: reversible_coupling(jnp.tanh, jnp.tanh, ONES, ONES, stream_dtype="int8"), ValueError, "stream_dtype is int8"),
    "complex into real": (lambda: reversible_coupling(lambda x: x * 1j, jnp.tanh, ONES, ONES), TypeError, "f of coupling 0 returned complex64"),
    "a real stream dtype of complex streams": (
        lambda: reversible_coupling(jnp.tanh, jnp.tanh, ONES + 0j, ONES, stream_dtype=jnp.float32),
        TypeError,
        "x1 is of dtype complex64, but must be real",
    ),
    "exact and complex": (lambda: reversible_coupling(jnp.tanh, jnp.tanh, ONES + 0j, ONES, exact=True), TypeError, "exact"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_an_error(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("size", [1e30, 1.0, 1e-30])
def test_exact_streams_of_two_dtypes_and_any_size_are_undone(size):
    with jax.enable_x64(True):
        x1, x2 = size * draw(0, (4,), jnp.float32), size * draw(1, (4,), jnp.float64)
        f, g = (lambda x: size * jnp.tanh(x / size)), (lambda x: size * jnp.sin(x / size))
        run = lambda coupling: jax.grad(lambda x1, x2: sum(jnp.sum(y / size) for y in coupling(f, g, x1, x2)), (0, 1))(x1, x2)
        for ours, theirs in zip(run(partial(reversible_coupling, exact=True)), run(plain_coupling), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        y1 = reversible_coupling(f, g, x1, x2, exact=True)[0]
        np.testing.assert_allclose(y1 / size, (x1 + f(x2)) / size, rtol=1e-4, atol=1e-4)
