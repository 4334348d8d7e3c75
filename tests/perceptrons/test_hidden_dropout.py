"""Dropout between the two maps of `mlp` and `gated_mlp`: the same as `layers.dropout` of a hidden layer that is there, in the memory of none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import layers
from layers import linen
from layers.perceptrons.gated_mlp import GatedMLP, gated_mlp
from layers.perceptrons.mlp import MLP, mlp
from tests.perceptrons.test_mlp import OURS, SHAPES, draw, loss
from tests.support import assert_trees_close, saved_bytes, temp_bytes

BOTH = pytest.mark.parametrize("name", OURS)
KEY = jax.random.key(3)


def plain(name, x, *parameters, rate, key=KEY):
    """The same with a hidden layer that is there."""
    *up, down, down_bias = parameters[: 2 if name == "mlp" else 3] + parameters[-1:]
    biases = parameters[len(up) + 1 : -1]
    a = [x @ kernel + bias for kernel, bias in zip(up, biases, strict=True)]
    h = jax.nn.gelu(a[0]) if name == "mlp" else jax.nn.silu(a[0]) * a[1]
    return layers.dropout(h, key, rate=rate) @ down + down_bias


def everything(fn, args):
    """Value, gradients, tangent, and the gradient of that."""
    moves = tuple(jnp.cos(a) for a in args)
    tangent = lambda *a: jax.jvp(lambda *a: loss(fn(*a)), a, moves)[1]
    everywhere = tuple(range(len(args)))
    return jax.value_and_grad(lambda *a: loss(fn(*a)), everywhere)(*args), jax.value_and_grad(tangent, everywhere)(*args)


@pytest.mark.parametrize("save", ["inputs", "preactivations"])
@BOTH
def test_dropout_is_that_of_the_whole_hidden_layer_in_blocks_of_any_size(name, save):
    with jax.enable_x64(True):
        args = draw(((2, 5, 3), *SHAPES[name]), jnp.float64)
        ours = partial(OURS[name], save=save, block_size=4, dropout_rate=0.4, dropout_key=KEY)
        theirs = partial(plain, name, rate=0.4)
        assert_trees_close(*(jax.jit(partial(everything, fn))(args) for fn in (ours, theirs)), rtol=1e-9, atol=1e-9)


@BOTH
def test_traced_rate_gives_what_a_known_one_does(name):
    args = draw(((5, 3), *SHAPES[name]))
    run = lambda rate: jax.value_and_grad(lambda x: loss(OURS[name](x, *args[1:], block_size=2, dropout_rate=rate, dropout_key=KEY)))(args[0])
    for rate in (0.0, 0.25, 1.0):
        assert_trees_close(jax.jit(run)(rate), run(rate), rtol=1e-4, atol=1e-4)


def test_elements_of_a_batch_and_steps_of_a_loop_have_masks_of_their_own_keys():
    x, *parameters = draw(((3, 4, 3), *SHAPES["mlp"]))
    keys = jax.random.split(KEY, 3)
    one = jax.value_and_grad(lambda x, key: loss(mlp(x, *parameters, block_size=2, dropout_rate=0.5, dropout_key=key)))
    alone = jax.tree.map(lambda *rows: jnp.stack(rows), *map(one, x, keys))
    assert_trees_close(jax.jit(jax.vmap(one))(x, keys), alone, rtol=1e-5, atol=1e-5)
    assert_trees_close(jax.jit(lambda: jax.lax.scan(lambda _, row: (None, one(*row)), None, (x, keys))[1])(), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.devices(4)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_masks_are_the_same_where_the_rows_lie_on_several_devices(kind):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    x, *parameters = draw(((16, 3), *SHAPES["mlp"]))
    run = jax.jit(jax.value_and_grad(lambda x: loss(mlp(x, *parameters, block_size=2, dropout_rate=0.5, dropout_key=KEY))))
    with jax.set_mesh(mesh):
        found = run(jax.device_put(x, NamedSharding(mesh, P("rows"))))
    assert_trees_close(jax.device_get(found), jax.device_get(run(x)), rtol=1e-5, atol=1e-5)


@BOTH
def test_mask_takes_no_memory(name):
    shapes = {"mlp": ((32, 128), (128, 32), (128,), (32,)), "gated_mlp": ((32, 128), (32, 128), (128, 32), (128,), (128,), (32,))}[name]
    args = draw(((1024, 32), *shapes))
    fn = partial(OURS[name], save="inputs", block_size=128)
    drops = partial(fn, dropout_rate=0.1, dropout_key=KEY)
    assert saved_bytes(drops, *args) <= saved_bytes(fn, *args) + 64
    of_step = lambda fn: temp_bytes(jax.grad(lambda *a: loss(fn(*a)), tuple(range(len(args)))), *args)
    assert of_step(drops) <= of_step(fn) + 2 * 4 * 128 * 128  # of a block: its words, and what they leave


@BOTH
def test_what_is_dropped_is_not_touched(name):
    x, *parameters = draw(((2, 3), *SHAPES[name]))
    mask = layers.dropout(jnp.ones((2, 7)), KEY, rate=0.7)
    unit = int(jnp.argmin(mask.sum(0)))
    assert not mask[:, unit].any()
    bias = len(parameters) - 2
    spoiled = [p.at[unit].set(jnp.nan) if i == bias else p for i, p in enumerate(parameters)]
    run = jax.jit(jax.value_and_grad(lambda *a: loss(OURS[name](*a, dropout_rate=0.7, dropout_key=KEY)), tuple(range(1 + len(parameters)))))
    assert_trees_close(run(x, *spoiled), run(x, *parameters), rtol=1e-6)


@pytest.mark.parametrize("module", [MLP, GatedMLP])
def test_module_drops_by_its_stream_unless_told_not_to(module):
    model, x = module(3, 6, 4, dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=5)), draw(((5, 3),))[0]
    still = module(3, 6, 4, rngs=nnx.Rngs(0))(x)
    first, second = model(x), model(x)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(model(x, rngs=KEY), model(x, rngs=KEY))
    for known in (model(x, deterministic=True), nnx.view(model, deterministic=True)(x)):
        np.testing.assert_array_equal(known, still)
    model.eval()
    np.testing.assert_array_equal(model(x), still)
    assert not np.allclose(model(x, deterministic=False), still)
    by_hand = {"MLP": mlp, "GatedMLP": gated_mlp}[module.__name__]
    maps = (model.up, model.down) if module is MLP else (model.gate, model.up, model.down)
    biases = [m.bias[...] for m in maps] if module is MLP else []
    expected = by_hand(x, *(m.kernel[...] for m in maps), *biases, dropout_rate=0.5, dropout_key=KEY)
    np.testing.assert_array_equal(model(x, deterministic=False, rngs=KEY), expected)


@pytest.mark.parametrize("name", ["MLP", "GatedMLP"])
def test_linen_module_drops_by_linen_streams(name):
    model, x = getattr(linen, name)(3, 6, 4, dropout_rate=0.5), draw(((5, 3),))[0]
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    runs = [model.apply(variables, x, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2])
    still = model.apply(variables, x, deterministic=True)
    plain = getattr(linen, name)(3, 6, 4)
    np.testing.assert_array_equal(still, plain.apply({"params": variables["params"]}, x))


@BOTH
def test_rate_has_no_gradient_and_needs_a_key(name):
    args = draw(((2, 3), *SHAPES[name]))
    with pytest.raises(TypeError, match=f"{name}: .*dropout_rate.* no gradient"):
        jax.grad(lambda rate: loss(OURS[name](*args, dropout_rate=rate, dropout_key=KEY)))(0.5)
    with pytest.raises(ValueError, match=f"{name}: dropout_rate is above 0, so give dropout_key"):
        OURS[name](*args, dropout_rate=0.5)
