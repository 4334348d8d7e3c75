"""The linear layer in PyTorch's and in Flax's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers.affine.linear import LinearFunction
from tests.support import assert_trees_close, jit_grad, saved_bytes, temp_bytes, torch_reference


def draw(dtype, *shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("biased", [True, False])
def test_gradient_is_that_of_autodiff(batch, biased):
    with jax.enable_x64(True):
        x, kernel, bias, dy = draw(jnp.float64, (*batch, 3), (3, 4), (4,), (*batch, 4))
        args = (x, kernel, bias) if biased else (x, kernel)
        ours, theirs = (jax.vjp(f, *args) for f in (layers.linear, lambda x, w, b=0: x @ w + b))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        assert_trees_close(ours[1](dy), theirs[1](dy), rtol=1e-10)


def test_torch_layout_and_tape():
    x, w, b = LinearFunction.example(jax.random.key(0), jnp.float32)
    y, grad_fn = LinearFunction.vjp(x, w, b)
    dx, dw, db = grad_fn.apply(jnp.ones_like(y))
    np.testing.assert_allclose(y, x @ w.T + b, rtol=1e-6)
    np.testing.assert_allclose(dx, np.tile(w.sum(0), (5, 1)), rtol=1e-5)
    np.testing.assert_allclose(dw, np.tile(x.sum(0), (4, 1)), rtol=1e-5)
    np.testing.assert_array_equal(db, np.full(4, 5.0))
    assert grad_fn.name() == "LinearFunctionBackward"


def test_agrees_with_torch():
    r = torch_reference("linear")
    with jax.enable_x64(True):
        y, pull = jax.vjp(LinearFunction.apply, r["x"], r["weight"], r["bias"])
        np.testing.assert_allclose(y, r["y"], rtol=1e-10)
        for name, ours in zip(("x", "weight", "bias"), pull(jnp.cos(y)), strict=True):
            np.testing.assert_allclose(ours, r[f"d_{name}"], rtol=1e-10, atol=1e-12)


def test_saves_nothing_beyond_its_arguments():
    assert saved_bytes(LinearFunction.apply, *LinearFunction.example(jax.random.key(0), jnp.float32)) <= 0


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}, {"precision": "highest"}])
def test_module_is_flax_linear(options):
    ours, theirs = (m(3, 4, rngs=nnx.Rngs(7), **options) for m in (layers.Linear, nnx.Linear))
    (x,) = draw(jnp.float32, (2, 5, 3))
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)), rtol=0)
    y, y_flax = ours(x), theirs(x)
    assert y.dtype == y_flax.dtype
    np.testing.assert_allclose(np.float32(y), np.float32(y_flax), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((5, 3), (4, 3)), "kernel has shape"), (((5, 3), (3,)), "kernel has shape"), (((5, 3), (3, 4), (3,)), "bias has shape")],
)
def test_shapes_that_do_not_fit_are_errors(shapes, message):
    with pytest.raises(ValueError, match=message):
        layers.linear(*draw(jnp.float32, *shapes))


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}])
def test_loop_over_layers_keeps_neither_a_transpose_nor_a_cast_of_the_kernels(options):
    def memory(module):
        layer = nnx.vmap(lambda key: module(64, 64, rngs=nnx.Rngs(key), **options))(jax.random.split(jax.random.key(0), 8))
        graph, state = nnx.split(layer)

        def run(state, x):
            step = nnx.scan(lambda x, layer: jnp.tanh(layer(x)).astype(x.dtype), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, nnx.merge(graph, state)).sum()

        return temp_bytes(jax.grad(run, (0, 1)), state, jnp.ones((4, 64)))

    assert memory(layers.Linear) <= memory(nnx.Linear) + 1024


def test_real_kernel_under_complex_rows_has_the_real_gradient_of_autodiff():
    x, kernel, bias = draw(jnp.float32, (5, 3), (3, 4), (4,))
    run = lambda fn: jit_grad(lambda x, *p: jnp.abs(fn(x, *p)).sum(), (0, 1, 2))(x * (1 + 0.5j), kernel, bias)
    assert_trees_close(run(layers.linear), run(lambda x, k, b: x @ k + b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "error", "message"), [((3, -5), ValueError, "Linear: out_features is -5"), (("3", 5), TypeError, "Linear: in_features is '3'")]
)
def test_sizes_that_make_no_layer_are_errors(sizes, error, message):
    with pytest.raises(error, match=message):
        layers.Linear(*sizes, rngs=nnx.Rngs(0))
