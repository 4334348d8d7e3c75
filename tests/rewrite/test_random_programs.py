"""Random programs of elementwise operations, products, reductions, softmaxes and norms: the same values and gradients rewritten as plain."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import layers
from layers.rewriting import patterns

N = 6
UNARY = {
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "softplus": lambda x: jnp.log(1 + jnp.exp(x)),
    "transpose": lambda x: x.T,
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "softmax of columns": lambda x: jax.nn.softmax(x, 0),
    "log_softmax": lambda x: jax.nn.log_softmax(x, -1),
    "mean of squares": lambda x: (x * x).mean(-1, keepdims=True) + 1e-3,
    "rms": lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-3),
    "rms of columns": lambda x: x * jax.lax.rsqrt((x * x).mean(0, keepdims=True) + 1e-3),
    "standardized": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3),
    "masked": lambda x: jnp.where(jnp.tril(jnp.ones((N, N), bool)), x, -1e9),
    "diagonal": lambda x: jnp.take_along_axis(x, jnp.arange(N)[:, None] % x.shape[1], axis=1),
    "half": lambda x: x * 0.5,
    "sin": jnp.sin,
    "gauss": lambda x: jnp.exp(-x * x),
    "narrow": lambda x: x.astype(jnp.float32).astype(x.dtype),
    "dropped": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(1), 0.7, x.shape), x / 0.7, 0),
    "rotated": lambda x: jnp.concatenate([x[:, N // 2 :] * jnp.sin(x[:, : N // 2]), x[:, : N // 2]], -1),
    "first column": lambda x: x[:, :1] * jnp.ones((1, N)),
}
BINARY = {"add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "dot": lambda a, b: jnp.broadcast_to(a, (N, N)) @ jnp.broadcast_to(b, (N, N))}
STEPS = st.lists(st.tuples(st.sampled_from([*UNARY, *BINARY, "dot", "mul"]), st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=12)


def program(steps):
    def fn(x, y, z):
        made = [x, y, z]
        for name, i, j in steps:
            a, b = made[-1 - i % len(made)], made[-1 - j % len(made)]
            out = UNARY[name](jnp.broadcast_to(a, (N, N))) if name in UNARY else BINARY[name](a, b)
            made.append(jnp.clip(out, -10, 10) if name in ("mul", "dot") and i == 5 else out)
        return sum((m * jnp.cos(jnp.arange(m.size, dtype=m.dtype)).reshape(m.shape)).sum() for m in made[-2:])

    return fn


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(STEPS)
def test_values_and_gradients_are_the_same(steps):
    fn, before = program(steps), patterns.pays
    patterns.pays = lambda match: True
    try:
        with jax.enable_x64():
            args = [jax.random.normal(k, (N, N), jnp.float64) for k in jax.random.split(jax.random.key(3), 3)]
            run = jax.jit(lambda *a: [jax.value_and_grad(f, (0, 1, 2))(*a) for f in (fn, layers.rewrite(fn))])
            plain, new = run(*args)
    finally:
        patterns.pays = before
    for e, a in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (plain, new)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-8 * (1 + np.abs(e[np.isfinite(e)]).max(initial=0)))


def ways(f, x, y, z):
    """Derivatives of `f` both ways, twice, over a batch, in a loop and with rematerialisation."""
    slope = lambda x: jax.jvp(lambda x: f(x, y, z), (x,), (y,))[1]
    batch = jax.vmap(jax.grad(f), (0, None, None))(jnp.stack([x, y]), y, z)
    looped = lambda x: jax.lax.scan(lambda c, a: (c + 0.1 * jnp.tanh(f(c, y, z)) * a, None), x, jnp.stack([y, z]))[0].sum()
    return slope(x), jax.grad(slope)(x), batch, jax.grad(looped)(x), jax.grad(jax.checkpoint(f), (0, 1))(x, y, z)


GROUPS = ["sin", "gauss", "tanh", "half", "dropped", "rotated", "first column", "relu", "add", "mul", "sub", "dot"]
SHORT = st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=7)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(SHORT)
def test_groups_are_the_same_under_each_transformation(steps):
    fn = program(steps)
    with jax.enable_x64():
        args = [jax.random.normal(k, (N, N), jnp.float64) for k in jax.random.split(jax.random.key(4), 3)]
        plain, new = jax.jit(lambda *a: [ways(f, *a) for f in (fn, layers.rewrite(fn))])(*args)
    for e, a in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (plain, new)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-8 * (1 + np.abs(e[np.isfinite(e)]).max(initial=0)))


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(SHORT)
def test_groups_keep_no_more_than_autodiff(steps):
    fn = program(steps)
    args = [jax.ShapeDtypeStruct((N, N), jnp.float32)] * 3
    plain, new = (layers.residuals(f, *args).extra for f in (fn, layers.rewrite(fn)))
    assert new <= plain
