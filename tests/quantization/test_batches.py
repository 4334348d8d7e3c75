"""Quantisers of a batch that lies over the devices of a mesh, and of a symbolic number of vectors (`jax.export`), are those of one device."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.quantization.fake_quantize import fake_quantize
from layers.quantization.finite_scalar_quantize import finite_scalar_quantize
from layers.quantization.int8_linear import int8_linear
from layers.quantization.residual_vector_quantize import residual_vector_quantize
from layers.quantization.ternarize import ternarize
from layers.quantization.vector_quantize import VectorQuantizer, vector_quantize
from tests.support import assert_trees_close

X, BOOK, BIAS = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(16, 5, 4), (6, 4), (6,)]))
LAYERS = {
    "vector_quantize": lambda x, book, _: vector_quantize(x, book, gradient="rotation"),
    "residual_vector_quantize": lambda x, book, _: residual_vector_quantize(x, (book, book[:4] / 2)),
    "fake_quantize": lambda x, _, bias: fake_quantize(x, bias[0] ** 2, bits=4),
    "fake_quantize of channels": lambda x, book, _: fake_quantize(x, book[0] ** 2, bits=4, axis=-1),
    "int8_linear": lambda x, book, bias: int8_linear(x, book.T, bias),
    "ternarize": lambda x, _book, _bias: ternarize(x),
    "finite_scalar_quantize": lambda x, _book, _bias: finite_scalar_quantize(x, (8, 5, 3, 4)),
}


def both(name):
    """The outputs, and the gradients of a sum in which each has a weight."""

    def loss(*args):
        out = LAYERS[name](*args)
        return sum((jnp.sin(y + 1) * (1 + i)).sum() for i, y in enumerate(jax.tree.leaves(out)) if y.dtype == jnp.float32), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


@pytest.fixture(scope="module")
def expected():
    return {name: jax.device_get(jax.jit(both(name))(X, BOOK, BIAS)) for name in LAYERS}


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", LAYERS)
def test_batch_over_devices_is_that_of_one_and_is_not_gathered(name, kind, expected):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    args = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((X, P("data")), (BOOK, P()), (BIAS, P()))]
    program = jax.jit(both(name)).lower(*args).compile()
    assert not any(moved in program.as_text() for moved in ("all-gather(", "all-to-all(", "collective-permute("))
    assert_trees_close(jax.device_get(program(*args)), expected[name], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_exported_for_any_batch(name, expected):
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 5, 4"), jnp.float32)
    call = jax.export.export(jax.jit(both(name)))(batch, BOOK, BIAS).call
    assert_trees_close(jax.device_get(call(X, BOOK, BIAS)), expected[name], rtol=2e-5, atol=1e-5)


def test_symbolic_batch_may_be_empty():
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b - 1, 5, 4"), jnp.float32)
    call = jax.export.export(jax.jit(both("vector_quantize")))(batch, BOOK, BIAS).call
    (loss, (_, _, losses)), grads = call(X[:0], BOOK, BIAS)
    assert losses.codebook == losses.commitment == 0 and jnp.isfinite(loss)
    assert not any(g.any() for g in grads)


@pytest.mark.devices(8)
def test_moving_average_of_a_batch_over_devices_is_that_of_one():
    @nnx.jit
    def move(layer, x):
        layer(x)
        return nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    make = lambda: VectorQuantizer(6, 4, ema=True, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        moved = jax.device_get(move(make(), jax.device_put(X, NamedSharding(mesh, P("data")))))
    assert_trees_close(moved, jax.device_get(move(make(), X)), rtol=1e-5, atol=1e-6)
