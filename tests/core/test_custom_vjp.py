"""`layers.custom_vjp` takes the place of `jax.custom_vjp`: functions that people write with that, each beside the same in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.function import engine
from tests.core.functions import floats
from tests.support import assert_trees_close

X = floats(4)


def defined(fun, fwd, bwd, **options):
    made = layers.custom_vjp(fun, **{k: v for k, v in options.items() if k.startswith("nondiff")})
    made.defvjp(fwd, bwd, **{k: v for k, v in options.items() if not k.startswith("nondiff")})
    return made


def logsumexp(x):
    return jnp.log(jnp.sum(jnp.exp(x)))


def safe_norm(x):
    return jnp.where(x.any(), jnp.sqrt(jnp.sum(jnp.square(jnp.where(x.any(), x, 1)))), 0)


def attention(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def attention_bwd(res, g):
    q, k, v, p = res
    dp = g @ v.T
    ds = p * (dp - jnp.sum(dp * p, -1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ g


def attention_fwd(q, k, v):
    p = jax.nn.softmax(q @ k.T)
    return p @ v, (q, k, v, p)


def table(w, rows):
    return w[rows]


def table_bwd(res, g):
    rows, shape = res
    return jnp.zeros(shape).at[rows].add(g), np.zeros(rows.shape, jax.dtypes.float0)


def affine(params, x):
    return params["scale"] * x + params["shift"], x.sum()


def affine_bwd(res, g):
    (scale, x), (dy, ds) = res, g
    return {"scale": dy * x, "shift": dy}, dy * scale + ds


ROWS = jnp.array([0, 2, 2])

# name: (the function, the same in plain JAX, arguments)
PUBLIC = {
    "safe logarithm of one plus exponential": (
        defined(lambda x: jnp.log1p(jnp.exp(x)), lambda x: (jnp.log1p(jnp.exp(x)), x), lambda x, g: (g * jax.nn.sigmoid(x),)),
        lambda x: jnp.log1p(jnp.exp(x)),
        (X,),
    ),
    "silu that keeps its input": (
        defined(jax.nn.silu, lambda x: (jax.nn.silu(x), x), lambda x, g: (g * jax.nn.sigmoid(x) * (1 + x * jax.nn.sigmoid(-x)),)),
        jax.nn.silu,
        (X,),
    ),
    "logsumexp": (
        defined(logsumexp, lambda x: (logsumexp(x), x), lambda x, g: (g * jax.nn.softmax(x),)),
        logsumexp,
        (X,),
    ),
    "norm that is safe at zero": (
        defined(safe_norm, lambda x: (safe_norm(x), x), lambda x, g: (jnp.where(x.any(), g * x / safe_norm(jnp.where(x.any(), x, 1)), 0),)),
        jnp.linalg.norm,
        (X,),
    ),
    "tanh and its inverse": (
        defined(lambda x: (jnp.tanh(x), x), lambda x: ((jnp.tanh(x), x), jnp.tanh(x)), lambda y, g: (g[0] * (1 - y * y) + g[1],)),
        lambda x: (jnp.tanh(x), x),
        (X,),
    ),
    "power with an exponent that is no argument": (
        functools.partial(
            lambda f, x: f(x, n=3),
            defined(lambda x, n: x**n, lambda x, n: (x**n, x), lambda n, x, g: (g * n * x ** (n - 1),), nondiff_argnames="n"),
        ),
        lambda x: x**3,
        (X,),
    ),
    "attention": (defined(attention, attention_fwd, attention_bwd), attention, (floats(3, 2), floats(4, 2, seed=1), floats(4, 2, seed=2))),
    "rows of a table": (
        functools.partial(lambda f, w: f(w, ROWS), defined(table, lambda w, r: (w[r], (r, w.shape)), table_bwd)),
        lambda w: w[ROWS],
        (floats(3, 2),),
    ),
    "affine of a dict": (
        functools.partial(
            lambda f, s, b, x: f({"scale": s, "shift": b}, x), defined(affine, lambda p, x: (affine(p, x), (p["scale"], x)), affine_bwd)
        ),
        lambda s, b, x: affine({"scale": s, "shift": b}, x),
        (X, X, 2 * X),
    ),
    "product that omits what is not differentiated": (
        defined(
            lambda x, y: x * y,
            lambda x, y: (x.value * y.value, (x.value if y.perturbed else None, y.value if x.perturbed else None)),
            lambda r, g: (None if r[1] is None else g * r[1], None if r[0] is None else g * r[0]),
            symbolic_zeros=True,
        ),
        lambda x, y: x * y,
        (X, X + 1),
    ),
}


def loss(fn):
    return lambda *args: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(*args)))


def every(fn, count):
    return tuple(range(count))


WAYS = {
    "grad": lambda f, n: jax.grad(f, every(f, n)),
    "hessian": lambda f, n: jax.hessian(f, every(f, n)),
    "jvp": lambda f, n: lambda *a: jax.jvp(f, a, a)[1],
    "vmap": lambda f, n: lambda *a: jax.vmap(jax.grad(f, every(f, n)))(*[jnp.stack([x, x / 2]) for x in a]),
    "scan": lambda f, n: jax.grad(lambda *a: jax.lax.scan(lambda c, _: (c + f(*a), None), 0.0, None, length=2)[0], every(f, n)),
    "remat": lambda f, n: jax.grad(jax.checkpoint(f), every(f, n)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_agrees_with_plain_jax_under_every_transformation(name):
    fn, plain, args = PUBLIC[name]
    ways = {way: make for way, make in WAYS.items() if way != "jvp" or engine.current() == "linear"}
    given, expected = (jax.jit(lambda *a, f=f: {way: make(loss(f), len(a))(*a) for way, make in ways.items()})(*args) for f in (fn, plain))
    assert_trees_close(given, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore:gradcheck")
def test_public_function_passes_gradcheck(name):
    fn, _, args = PUBLIC[name]
    assert layers.gradcheck(fn, args)


@pytest.mark.linear_engine
@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_passes_the_contract(name):
    fn, _, args = PUBLIC[name]
    layers.check(fn, *args).raise_if_failed()


def test_planted_fault_is_found_by_gradcheck_and_the_contract():
    wrong = defined(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))
    with pytest.raises(layers.GradcheckError, match="constant factor: the gradient is 2"):
        layers.gradcheck(wrong, (np.asarray(X, np.float64),))
    report = layers.check(wrong, X)
    assert "gradient" in {r.clause for r in report.rows if r.outcome == "failed"}


def test_gradient_that_is_no_derivative_is_the_rule():
    straight = defined(lambda x: jnp.round(x), lambda x: (jnp.round(x), None), lambda _, g: (g,))
    clipped = defined(lambda lo, hi, x: x, lambda lo, hi, x: (x, (lo, hi)), lambda r, g: (None, None, jnp.clip(g, *r)))
    np.testing.assert_array_equal(jax.grad(lambda x: (3 * straight(x)).sum())(X), jnp.full(4, 3.0))
    np.testing.assert_array_equal(jax.grad(lambda x: (3 * clipped(-1.0, 1.0, x)).sum())(X), jnp.ones(4))
    with pytest.raises(TypeError, match="forward mode cannot be derived from its backward" if engine.current() == "linear" else "forward"):
        jax.jvp(lambda x: clipped(-1.0, 1.0, x), (X,), (X,))


def test_decorator_takes_keywords_defaults_and_the_attributes_of_the_function():
    @functools.partial(layers.custom_vjp, nondiff_argnums=(0,))
    def scaled(fn, x, y=2.0):
        """Doc."""
        return fn(x) * y

    scaled.defvjp(lambda fn, x, y: (fn(x) * y, (x, y)), lambda fn, r, g: (g * jnp.cos(r[0]) * r[1], g * fn(r[0])))
    assert (scaled.__name__, scaled.__doc__, scaled.nondiff_argnums) == ("scaled", "Doc.", (0,))
    np.testing.assert_allclose(jax.grad(lambda x: scaled(jnp.sin, y=3.0, x=x).sum())(X), 3 * jnp.cos(X), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda y: scaled(jnp.sin, X, y).sum())(2.0), jnp.sin(X).sum(), rtol=1e-5)


def test_one_call_differentiated_in_two_patterns_has_both_gradients():
    product = jax.jit(PUBLIC["product that omits what is not differentiated"][0])
    f = lambda x, y: (product(jax.lax.stop_gradient(x), y) + product(x, jax.lax.stop_gradient(y))).sum()
    assert_trees_close(jax.grad(f, (0, 1))(X, X + 1), (X + 1, X), rtol=1e-6)


def test_existing_object_is_taken_over():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def power(x, n):
        return x**n

    power.defvjp(lambda x, n: (x**n, x), lambda n, x, g: (g * n * x ** (n - 1),))
    np.testing.assert_allclose(jax.hessian(lambda x: layers.from_custom_vjp(power)(x, 3))(2.0), 12.0, rtol=1e-6)
    for wrong in (jnp.sin, jax.jit(power), None):
        with pytest.raises(TypeError, match="from_custom_vjp: fn is "):
            layers.from_custom_vjp(wrong)
    with pytest.raises(AttributeError, match="from_custom_vjp: fn has no rules"):
        layers.from_custom_vjp(jax.custom_vjp(jnp.sin))


def closes_over(x):
    return defined(lambda y: x * y, lambda y: (x * y, x), lambda r, g: (g * r,))(1.0)


WRONG = {
    "no rules": (lambda: layers.custom_vjp(lambda x: x)(X), AttributeError, "has no rules"),
    "arguments": (lambda: PUBLIC["attention"][0](X), TypeError, "attention: missing a required argument: 'k'; it takes"),
    "no pair": (lambda: jax.grad(defined(lambda x: x, lambda x: x, lambda r, g: (g,)))(1.0), TypeError, "fwd must return a pair"),
    "too many": (
        lambda: jax.grad(defined(lambda x: x, lambda x: (x, None), lambda r, g: (g, g)))(1.0),
        TypeError,
        r"bwd must return a tuple of 1 gradient\(s\), one for each argument, but returned 2 of them",
    ),
    "closure": (lambda: jax.grad(closes_over)(1.0), TypeError, "closes over a traced array"),
    "traced static": (
        lambda: jax.jit(defined(lambda x, n: x, lambda x, n: (x, None), lambda n, r, g: (g,), nondiff_argnums=(1,)))(1.0, 2.0),
        TypeError,
        "argument 1 is one of nondiff_argnums, but holds a traced array",
    ),
    "no such argument": (lambda: layers.custom_vjp(lambda x: x, nondiff_argnums=1), ValueError, "nondiff_argnums is 1, but must be"),
    "counted from the end": (lambda: layers.custom_vjp(lambda x, n: x, nondiff_argnums=-1), ValueError, "nondiff_argnums is -1, but must be"),
    "no number of an argument": (lambda: layers.custom_vjp(lambda x: x, nondiff_argnums="x"), TypeError, "nondiff_argnums is 'x', but must be"),
    "rule that is no function": (
        lambda: layers.custom_vjp(jnp.sin).defvjp(None, None),
        TypeError,
        r"sin.defvjp: fwd is None, but must be a function",
    ),
    "unknown name": (lambda: layers.custom_vjp(lambda x: x, nondiff_argnames=("n",)), ValueError, "nondiff_argnames names 'n'"),
    "both options": (
        lambda: defined(lambda x: x, lambda x: (x, None), lambda r, g: (g,), symbolic_zeros=True, optimize_remat=True),
        NotImplementedError,
        "optimize_remat does not go with symbolic_zeros",
    ),
    "no function": (lambda: layers.custom_vjp(3), TypeError, "custom_vjp: fun is 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_a_clear_error(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
