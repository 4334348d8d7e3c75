"""The deep equilibrium module: training on digits, options, noise, convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.implicit.deq import DEQ
from tests.support import draw_normal


class Cell(nnx.Module):
    def __init__(self, inputs, features, *, rngs, rate=0.0, scale=0.5):
        small = nnx.initializers.normal(scale / features**0.5)
        self.inner = nnx.Linear(features, features, rngs=rngs, kernel_init=small)
        self.outer = nnx.Linear(inputs, features, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.inner(self.dropout(z)) + self.outer(x))


class Contraction(Cell):
    """The weights into each unit sum to 0.9 at most (El Ghaoui et al., "Implicit Deep Learning", 2021)."""

    def __call__(self, z, x):
        kernel = self.inner.kernel[...]
        return jnp.tanh(z @ (kernel * jnp.minimum(1, 0.9 / jnp.abs(kernel).sum(0))) + self.outer(x))


class Reader(nnx.Module):
    def __init__(self, rngs):
        self.deq = DEQ(Contraction(64, 64, rngs=rngs), tol=1e-4)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        z, convergence = self.deq(x, return_convergence=True)
        return self.head(z), convergence


def test_digits_are_learned_and_every_solve_converges():
    optax, datasets = pytest.importorskip("optax"), pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order])
    model = Reader(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            logits, convergence = model(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), convergence

        (_, convergence), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return convergence.converged

    rng = np.random.default_rng(1)
    converged = []
    for _ in range(100):
        batch = rng.choice(1400, 128, replace=False)
        converged.append(step(model, optimizer, images[batch], labels[batch]))
    logits, convergence = model(images[1400:])
    assert np.all(converged) and convergence.converged
    assert (logits.argmax(-1) == labels[1400:]).mean() >= 0.95


def test_options_reach_the_solver():
    deq = DEQ(Cell(3, 3, rngs=nnx.Rngs(0)), solver="iteration", max_steps=2, tol=1e-12)
    z, convergence = deq(jnp.ones((2, 3)), return_convergence=True)
    assert convergence.iterations == 2 and not convergence.converged and z.shape == (2, 3)


def test_function_may_be_the_layer_and_z_have_another_shape():
    w = jnp.full((3, 5), 0.1)
    deq = DEQ(lambda z, x: jnp.tanh(0.3 * z + x @ w))
    z = deq(jnp.ones((2, 3)), jnp.zeros((2, 5)))
    np.testing.assert_allclose(z, jnp.tanh(0.3 * z + 0.3), rtol=1e-4)


def test_gradients_of_its_parameters_are_those_of_the_unrolled_layer():
    with jax.enable_x64(True):
        cell = Cell(3, 4, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(cell, nnx.Param, ...)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        x = draw_normal(0, (2, 3), jnp.float64)

        def implicit(params):
            return jnp.sin(DEQ(nnx.merge(graph, params, rest, copy=True), tol=1e-13, backward_tol=1e-12)(x, jnp.zeros((2, 4)))).sum()

        def explicit(params):
            layer = nnx.merge(graph, params, rest, copy=True)
            return jnp.sin(jax.lax.fori_loop(0, 100, lambda _, z: layer(z, x), jnp.zeros((2, 4)))).sum()

        got, want = (jax.jit(jax.grad(fn))(params) for fn in (implicit, explicit))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_dropout_has_one_mask_in_a_call_and_another_in_the_next():
    deq = DEQ(Cell(4, 4, rngs=nnx.Rngs(0), rate=0.5))
    x = jnp.ones((3, 4))
    run = nnx.jit(lambda deq, x: deq(x, return_convergence=True))
    first, convergence = run(deq, x)
    second, _ = run(deq, x)
    assert convergence.converged
    assert abs(first - second).max() > 1e-4


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.5, rngs=rngs)

    def __call__(self, z, x):
        return x + 0.1 * self.attention(z, deterministic=False)


class Drawing(nnx.Module):
    """Draws from a stream that it holds in two places, and from no other."""

    def __init__(self, rngs):
        self.rngs, self.again, self.unused = rngs, rngs, nnx.Rngs(1)

    def __call__(self, z, x):
        return 0.5 * jnp.tanh(z) + x + self.again.normal(z.shape)


@pytest.mark.parametrize("layer", [Attention, Drawing])
def test_any_random_layer_has_other_noise_in_the_next_call(layer):
    deq, x = DEQ(layer(nnx.Rngs(0))), draw_normal(0, (2, 3, 4))
    run = nnx.jit(lambda deq, x: deq(x, return_convergence=True))
    (first, convergence), (second, _) = run(deq, x), run(deq, x)
    assert convergence.converged and abs(first - second).max() > 1e-4


def test_only_streams_that_the_layer_drew_from_move_on():
    layer = Drawing(nnx.Rngs(0))
    DEQ(layer)(jnp.ones((2, 3)))
    assert layer.rngs.default.count[...] == 1 and layer.unused.default.count[...] == 0
    cell = Cell(4, 4, rngs=nnx.Rngs(0), rate=0.5)
    cell.eval()
    DEQ(cell)(jnp.ones((3, 4)))
    assert cell.dropout.rngs.count[...] == 0


def test_convergence_is_captured():
    deq = DEQ(Cell(4, 4, rngs=nnx.Rngs(0)))
    _, found = nnx.capture(nnx.Intermediate)(lambda deq, x: deq(x))(deq, jnp.ones((3, 4)))
    assert found["convergence"][0].converged


@pytest.mark.parametrize("option", [{"solver": "zzz"}, {"backward": "zzz"}, {"tol": -1.0}, {"max_steps": 0}])
def test_wrong_option_is_an_error_where_the_layer_is_made(option):
    with pytest.raises(ValueError, match=f"DEQ: {next(iter(option))} is"):
        DEQ(Cell(3, 3, rngs=nnx.Rngs(0)), **option)
