"""What the tests of the recurrent cells share: draws, losses, and any module as a function of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.core.blocks import block_size
from layers.recurrent import gates


def draw(seed, shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def loss(tree):
    """A sum in which every element of every array has a weight of its own."""
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)) for y in leaves)


def results(fn, *args):
    """Every output of `fn`, and the gradient of their loss by every argument, compiled."""

    def run(*args):
        out = fn(*args)
        return loss(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(run, tuple(range(len(args))), has_aux=True))(*args)
    return out, grads


def module_results(module, x, **kwargs):
    """Outputs and carry of an RNN module, and the gradients of its parameters and of x."""
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    out, (dparameters, dx) = results(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x, **kwargs), parameters, x)
    return out, nnx.to_pure_dict(dparameters), dx


def errors(got, exact):
    """The summed error of each array."""
    return [np.abs(np.asarray(a, np.float64) - np.asarray(e)).sum() for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)]


def short_chunks(monkeypatch, steps):
    """Chunks of so many steps, and no longer ones."""
    monkeypatch.setattr(gates, "block_size", lambda time, target: block_size(time, target, steps))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """For modules that compare values and no memory: most of their time is compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
