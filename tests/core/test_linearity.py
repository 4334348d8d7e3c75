"""Forward mode is derived from a backward that is linear, and refused for any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layers.function.function import Function

X, W = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 2.0, 3.0])


def made(backward):
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    return type("Made", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(lambda ctx, g: backward(*ctx.saved_tensors, g))})


NOT_LINEAR = {
    "compares a sum": lambda x, w, g: ((lambda w2: (w2 == w2.min()) * g)(w + 20 * g), g),
    "compares a product": lambda x, w, g: ((lambda w2: (w2 == w2.min()) * 1.0)(w * 20 * g), g),
    "adds a number": lambda x, w, g: (2 * g + 1, g * x),
    "adds an argument": lambda x, w, g: (g * w + x, g * x),
    "ignores it": lambda x, w, g: (w, g * x),
    "abs": lambda x, w, g: (jnp.abs(g) * w, g * x),
    "cuts negatives": lambda x, w, g: (jnp.maximum(g, 0) * w, g * x),
    "sign": lambda x, w, g: (jnp.sign(g) * w, g * x),
    "argmax": lambda x, w, g: (jax.nn.one_hot(jnp.argmax(g), 3), g * x),
    "a loop that starts from ones": lambda x, w, g: (lax.scan(lambda a, _: (a + g, None), jnp.ones(3), None, length=2)[0], g),
    "compares in a loop": lambda x, w, g: (lax.scan(lambda a, _: (a + jnp.where(g > 0, 1.0, 0.0), None), jnp.zeros(3), None, length=2)[0], g),
    "rounds to integers": lambda x, w, g: (g.astype(int).astype(float), g),
    "stopg": lambda x, w, g: (lax.stop_gradient(g), g),
    "branches": lambda x, w, g: (lax.cond(g.sum() > 0, lambda: jnp.ones(3), lambda: jnp.zeros(3)), g),
    "loops until": lambda x, w, g: (lax.while_loop(lambda s: s[0].sum() < 3.0, lambda s: (s[0] + 1.0,), (g,))[0], g),
    "sets in ones": lambda x, w, g: (jnp.ones(3).at[0].set(g[0]), g),
    "pads with ones": lambda x, w, g: (jnp.pad(g[:2], (0, 1), constant_values=1.0), g),
    "joins ones": lambda x, w, g: (jnp.concatenate([g[:2], jnp.ones(1)]), g),
    "adds under jit": lambda x, w, g: (jax.jit(lambda g: g + 1)(g), g),
    "clips": lambda x, w, g: (jnp.clip(g, -1, 1), g),
    "clips the norm": lambda x, w, g: (g * jnp.minimum(1.0, 1 / jnp.linalg.norm(g)), g),
    "sort": lambda x, w, g: (jnp.sort(g), g),
    "squares": lambda x, w, g: (g * jnp.abs(g) / jnp.linalg.norm(g), g),
}

LINEAR = {
    "a mask": lambda x, w, g: (jnp.where(x > 0, g, 0), g * x),
    "adds at repeated places": lambda x, w, g: (jnp.zeros_like(x).at[jnp.array([0, 1, 1])].add(g), g * x),
    "nothing for an argument": lambda x, w, g: (None, g),
    "zero times an argument": lambda x, w, g: (0 * x, g),
    "zero times it": lambda x, w, g: (g * 0, g),
    "scan": lambda x, w, g: (lax.scan(lambda a, s: (a + g * s, None), jnp.zeros(3), jnp.arange(2.0))[0], g),
    "loop": lambda x, w, g: (lax.fori_loop(0, 3, lambda i, a: a + g * i, jnp.zeros(3)), g),
    "loop over slices": lambda x, w, g: (lax.fori_loop(0, 3, lambda i, a: lax.dynamic_update_slice(a, (g[i] * w[i])[None], (i,)), jnp.zeros(3)), g),
    "a branch by an argument": lambda x, w, g: (lax.cond(x.sum() > 0, lambda g: g * 2, lambda g: jnp.zeros_like(g), g), g),
    "padded": lambda x, w, g: (jnp.pad(g[:2], (0, 1)), g),
    "joined to zeros": lambda x, w, g: (jnp.concatenate([g[:2], np.zeros(1)]), g),
    "stack": lambda x, w, g: (jnp.stack([g, g]).sum(0), g),
    "map": lambda x, w, g: (lax.map(lambda a: a[0] * a[1], (g, w)), g),
    "Fourier transform": lambda x, w, g: (jnp.fft.irfft(jnp.fft.rfft(g), 3), g),
    "roll": lambda x, w, g: (jnp.roll(g, 1), g),
    "reversed sum": lambda x, w, g: (jnp.cumsum(g[::-1])[::-1], g),
    "solved": lambda x, w, g: (jnp.linalg.solve(jnp.eye(3) * 2, g), g),
    "taken": lambda x, w, g: (jnp.take(g, jnp.array([2, 1, 0])), g),
    "a mask under remat": lambda x, w, g: (jax.checkpoint(lambda g: jnp.where(x > 0, g, 0))(g), g),
    "triangle": lambda x, w, g: (jnp.tril(jnp.outer(g, x)).sum(1), g),
    "einsum": lambda x, w, g: (jnp.einsum("i,ij->j", g, jnp.outer(x, w)), g),
    "mean": lambda x, w, g: (g - g.mean(), g),
    "batched": lambda x, w, g: (jax.vmap(lambda a, b: a * b)(g, w), g),
    "sums of segments": lambda x, w, g: (jax.ops.segment_sum(g, jnp.array([0, 1, 1]), 3), g),
    "split and joined": lambda x, w, g: (jnp.concatenate([*jnp.split(g[:2], 2), g[2:]]), g),
    "added to zeros": lambda x, w, g: (jnp.zeros(3) + g, g),
    "associative scan": lambda x, w, g: (lax.associative_scan(jnp.add, g), g),
    "convolve": lambda x, w, g: (jnp.convolve(g, w, "same"), g),
    "derivative by JAX": lambda x, w, g: jax.vjp(lambda a, b: jnp.tanh(a) @ jnp.diag(b), x, w)[1](g),
    "softmax": lambda x, w, g: jax.vjp(lambda a, b: jax.nn.softmax(a) * b, x, w)[1](g),
}


def tangents(cls):
    return jax.jvp(cls.apply, (X, W), (W, X))[1]


WAYS = {
    "eager": tangents,
    "jit": lambda cls: jax.jit(lambda: tangents(cls))(),
    "vmap": lambda cls: jax.vmap(lambda x: jax.jvp(cls.apply, (x, W), (W, X))[1])(X[None])[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_forward_mode_of_a_backward_that_is_not_linear_is_an_error(name, way):
    with pytest.raises(TypeError, match="Made has no jvp rule, and forward mode cannot be derived from its backward: that is not linear"):
        WAYS[way](made(NOT_LINEAR[name]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LINEAR)
def test_forward_mode_of_a_linear_backward_is_its_transpose(name, way):
    cls = made(LINEAR[name])
    pull = jax.vjp(cls.apply, X, W)[1]
    jacobians = [np.stack(rows) for rows in zip(*[pull(e) for e in jnp.eye(3)], strict=True)]
    np.testing.assert_allclose(WAYS[way](cls), jacobians[0] @ W + jacobians[1] @ X, rtol=1e-5, atol=1e-5)


def test_error_names_the_operation_that_is_not_linear():
    with pytest.raises(TypeError, match="`gt` decides by the gradient"):
        tangents(made(lambda x, w, g: (jnp.where(g > 0, x, 0) * 1.0, g)))
    with pytest.raises(TypeError, match="`add` joins to the gradient what does not depend on it"):
        tangents(made(lambda x, w, g: (g + x, g)))
