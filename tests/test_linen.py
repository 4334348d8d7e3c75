"""The Linen modules hold the parameters and give the values of the nnx modules that they are derived from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import layers
import layers.linen

X = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)

CASES = {
    "Linear": ((4, 5), {}, X),
    "LayerNorm": ((4,), {}, X),
    "RMSNorm": ((4,), {}, X),
    "GroupNorm": ((4, 2), {}, X),
    "Embed": ((7, 3), {}, jnp.array([[0, 6], [3, 3]])),
    "MultiHeadAttention": ((2, 4), {"decode": False}, X),
}


@pytest.mark.parametrize("name", CASES)
def test_linen_module_is_the_nnx_module(name):
    args, options, x = CASES[name]
    module = getattr(layers.linen, name)(*args, **options)
    variables = module.init(jax.random.key(0), x)
    twin = getattr(layers, name)(*args, **options, rngs=nnx.Rngs(0))
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(twin, nnx.Param))}
    flat = {"/".join(k.key for k in path): v for path, v in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert set(flat) == names
    state = nnx.state(twin, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = flat["/".join(map(str, path))]
    nnx.update(twin, state)
    np.testing.assert_allclose(module.apply(variables, x), twin(x), rtol=1e-5, atol=1e-6)


def test_trains_inside_a_linen_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.linen.Linear(5, 1, name="head")(layers.linen.LayerNorm(5)(nn.tanh(layers.linen.Linear(4, 5)(x))))

    net = Net()
    variables = net.init(jax.random.key(0), X)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, X) ** 2)))(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(jnp.abs(grads["params"]["head"]["kernel"]).max()) > 0


class _Block(nn.Module):
    """A step of a stack: `(carry, _) -> (carry, None)`."""

    @nn.compact
    def __call__(self, x, _):
        return x + layers.linen.Linear(4, 4, name="linear")(layers.linen.RMSNorm(4, name="norm")(x)), None


def _stack(block, depth=3):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)()


def _by_hand(params, x):
    for i in range(3):
        p = jax.tree.map(lambda a, i=i: a[i], params)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
        x = x + normed @ p["linear"]["kernel"] + p["linear"]["bias"]
    return x


@pytest.mark.parametrize("lift", [lambda b: b, nn.remat], ids=["scan", "remat in scan"])
def test_derived_modules_under_linen_scan_and_remat_have_the_gradient_of_the_formula(lift):
    stack = _stack(lift(_Block))
    variables = stack.init(jax.random.key(0), X, None)
    assert variables["params"]["linear"]["kernel"].shape == (3, 4, 4)

    def loss(variables):
        return jnp.sum(jnp.sin(stack.apply(variables, X, None)[0]))

    expected = jax.grad(lambda p: jnp.sum(jnp.sin(_by_hand(p, X))))(variables["params"])
    given = jax.jit(jax.grad(loss))(variables)["params"]
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-5), given, expected)


SEQUENCE = jnp.linspace(-1.0, 1.0, 40).reshape(2, 5, 4)
FURTHER = {
    "MLP": ((4, 6), {}),
    "GatedMLP": ((4, 6), {}),
    "LSTM": ((4, 6), {}),
    "GRU": ((4, 6), {}),
    "Mamba": ((4,), {}),
    "Int8Linear": ((4, 6), {}),
    "VectorQuantizer": ((8, 4), {}),
}


@pytest.mark.parametrize("name", FURTHER)
def test_modules_without_a_twin_in_flax_are_derived_too(name):
    args, options = FURTHER[name]
    module = getattr(layers.linen, name)(*args, **options)
    variables = module.init(jax.random.key(0), SEQUENCE)
    nnx_module = getattr(layers, name)(*args, **options, rngs=nnx.Rngs(0))
    ours = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(nnx_module, nnx.Param))}
    theirs = {"/".join(k.key for k in path): v for path, v in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    out = jax.tree.leaves(module.apply(variables, SEQUENCE))
    assert all(np.isfinite(x).all() for x in out)
