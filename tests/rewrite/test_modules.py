"""nnx modules as arguments: what they keep inside is kept, under nnx's own transformations too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import layers

X = jax.random.normal(jax.random.key(0), (16, 8))
Y = jnp.arange(16) % 5


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.outer(nnx.gelu(self.inner(self.dropout(self.norm(x)))))


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def steps(loss, jit):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, X, Y)
        optimizer.update(model, grads)
        return value

    step = nnx.jit(step) if jit else step
    return [float(step(model, optimizer)) for _ in range(2)], nnx.state(model)


def test_batch_statistics_counts_and_random_numbers_go_on():
    plain, state = steps(loss, True)
    new, new_state = steps(layers.rewrite(loss), True)
    np.testing.assert_allclose(new, plain, rtol=1e-4)
    for a, e in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, e, rtol=2e-2, atol=1e-4)


def test_what_is_not_changed_is_not_written():
    model = Model(nnx.Rngs(0))
    kernel = model.inner.kernel[...]
    layers.rewrite(loss)(model, X, Y)
    assert model.inner.kernel[...] is kernel
    assert int(model.calls[...]) == 1


def test_parts_are_replaced_in_a_module(everything_pays):
    model = Model(nnx.Rngs(0))
    names = [r.name for r in layers.rewrite(loss, skip=("elementwise", "product")).report(model, X, Y).replaced]
    assert sorted(names) == ["linear_cross_entropy", "mlp"] or sorted(names) == ["gelu", "linear_cross_entropy"]
    assert int(model.calls[...]) == 0


def test_module_that_is_given_twice_is_one():
    model = Model(nnx.Rngs(0))

    @layers.rewrite
    def both(a, b):
        a.calls[...] += 1
        return b.calls[...] + 0

    assert int(both(model, {"again": model}["again"])) == 1


def test_new_variable_is_an_error():
    def fn(model):
        model.extra = nnx.Variable(jnp.ones(3))

    with pytest.raises(ValueError, match="rewrite: the call made a new variable, extra"):
        layers.rewrite(fn)(Model(nnx.Rngs(0)))
