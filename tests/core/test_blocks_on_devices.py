"""Under plain `jax.jit` with rows that are sharded over devices, each device goes through its own rows: none are gathered."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.core.blocks import map_blocks, scan_blocks
from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.linear_dpo import linear_dpo
from layers.losses.linear_jsd import linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from layers.norms.add_layer_norm import add_layer_norm
from layers.norms.add_rms_norm import add_rms_norm
from layers.norms.batch_norm import batch_norm
from layers.norms.group_norm import group_norm
from layers.norms.layer_norm import layer_norm
from layers.norms.rms_norm import rms_norm
from layers.perceptrons.gated_mlp import gated_mlp
from layers.perceptrons.mlp import mlp
from layers.quantization.residual_vector_quantize import residual_vector_quantize
from layers.quantization.vector_quantize import vector_quantize
from tests.families import BLOCKS, names_of_layers_that_call
from tests.support import assert_trees_close

pytestmark = pytest.mark.devices(8)

BATCH, TIME, FEATURES, VOCAB = 8, 13, 1536, 50
"""13 rows a device: with blocks of at most 6 the last has one row. With so many features norms have blocks too."""


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, Y = draw(0, BATCH, TIME, FEATURES), draw(1, BATCH, TIME, FEATURES)
HIDDEN, OTHER = draw(2, BATCH, TIME, 6), draw(3, BATCH, TIME, 6)
LABELS = np.random.default_rng(4).integers(0, VOCAB, (BATCH, TIME))
SCALE, BIAS, KERNEL, UP, GATE, DOWN = draw(5, FEATURES), draw(6, FEATURES), draw(7, 6, VOCAB), draw(8, 6, 9), draw(9, 6, 9), draw(10, 9, 6)

CASES = {
    "rms_norm": (rms_norm, (X,), (SCALE,)),
    "layer_norm": (layer_norm, (X,), (SCALE, BIAS)),
    "add_rms_norm": (add_rms_norm, (X, Y), (SCALE,)),
    "add_layer_norm": (add_layer_norm, (X, Y), (SCALE, BIAS)),
    "group_norm": (group_norm, (X,), (SCALE, BIAS)),
    "batch_norm": (lambda x, s, b: batch_norm(x, s, b)[0], (X,), (SCALE, BIAS)),
    "linear_cross_entropy": (lambda x, y, k: linear_cross_entropy(x, k, y, block_size=6), (HIDDEN, LABELS), (KERNEL,)),
    "linear_cross_entropy of rows": (lambda x, y, k: linear_cross_entropy(x, k, y, reduction="none", block_size=6), (HIDDEN, LABELS), (KERNEL,)),
    "softmax_cross_entropy": (partial(softmax_cross_entropy, block_size=6), (draw(11, BATCH, TIME, VOCAB), LABELS), ()),
    "linear_jsd": (lambda x, t, k: linear_jsd(x, k, t, k[::-1], block_size=6), (HIDDEN, OTHER), (KERNEL,)),
    "linear_kl_divergence of rows": (
        lambda x, t, k: linear_kl_divergence(x, k, t, k[::-1], reduction="none", block_size=6),
        (HIDDEN, OTHER),
        (KERNEL,),
    ),
    "linear_dpo": (lambda c, r, y, k: linear_dpo(c, r, k, y, y[:, ::-1], r, c, k, block_size=6), (HIDDEN, OTHER, LABELS), (KERNEL,)),
    "vector_quantize": (lambda x, k: vector_quantize(x, k)[0], (HIDDEN,), (KERNEL.T,)),
    "residual_vector_quantize": (lambda x, k: residual_vector_quantize(x, [k, k / 2])[0], (HIDDEN,), (KERNEL.T,)),
    "mlp": (partial(mlp, block_size=6), (HIDDEN,), (UP, DOWN)),
    "gated_mlp": (partial(gated_mlp, block_size=6), (HIDDEN,), (UP, GATE, DOWN)),
}


def test_every_layer_that_goes_in_blocks_is_here():
    assert names_of_layers_that_call(BLOCKS) <= {name.split()[0] for name in CASES}


ON_EXPLICIT_AXES = ("layer_norm", "linear_cross_entropy", "linear_dpo", "mlp")
MESHES = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


def place(kind, rows, parameters, shape=(8,), axes="d"):
    """The rows on the devices of a mesh, the parameters on each of them."""
    mesh = jax.make_mesh(shape, ("d", "m")[: len(shape)], axis_types=(kind,) * len(shape))
    return [jax.device_put(x, NamedSharding(mesh, spec)) for given, spec in ((rows, P(axes)), (parameters, P())) for x in given]


jit_quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""The same instructions, compiled in less time to slower code."""


def gradient(fn, arguments):
    """Of a loss of the outputs, with respect to all arguments that have one."""
    differentiated = tuple(i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))
    return jax.value_and_grad(lambda *a: sum(jnp.sin(y).sum() for y in jax.tree.leaves(fn(*a))), differentiated)


def communication(compiled):
    """The instructions of the program that move data between devices."""
    kinds = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(-start)?\("
    return [line for line in compiled.as_text().splitlines() if re.search(kinds, line)]


def assert_only_sums_travel(compiled):
    """Sums, and those once, after the loops."""
    lines = communication(compiled)
    assert lines, "devices that share nothing cannot have the loss of all rows"
    assert not [line for line in lines if "all-reduce" not in line or "while/body" in line]


@pytest.mark.parametrize(("name", "kind"), [*((name, AxisType.Auto) for name in CASES), *((name, AxisType.Explicit) for name in ON_EXPLICIT_AXES)])
def test_gradient_with_sharded_rows_is_right_and_gathers_none(name, kind):
    fn, rows, parameters = CASES[name]
    run, placed = jit_quickly(gradient(fn, (*rows, *parameters))), place(kind, rows, parameters)
    compiled = run.lower(*placed).compile()
    assert_only_sums_travel(compiled)
    assert_trees_close(compiled(*placed), run(*rows, *parameters), rtol=2e-4, atol=2e-5)


@MESHES
@pytest.mark.parametrize("axes", ["d", ("d", "m")], ids=["one axis", "two axes"])
def test_rows_sharded_over_axes_of_a_mesh_of_two_are_not_gathered(axes, kind):
    fn, rows, parameters = CASES["rms_norm"]
    compiled = jit_quickly(gradient(fn, (*rows, *parameters))).lower(*place(kind, rows, parameters, (4, 2), axes)).compile()
    assert_only_sums_travel(compiled)


def body(sums, rows):
    return sums + jnp.sin(rows).sum(0), jnp.cos(rows)


@MESHES
@pytest.mark.parametrize(("rows", "block"), [(8, 1), (24, 2), (104, 5), (104, 200)])
def test_blocks_of_sharded_rows_give_the_sums_and_the_outputs_in_order(rows, block, kind):
    x = draw(0, rows, 3)
    run = jit_quickly(lambda x: scan_blocks(body, jnp.zeros(3), x, block=block))
    (placed,) = place(kind, (x,), ())
    assert_trees_close(run(placed), body(jnp.zeros(3), x), rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_divide_among_the_devices_are_right():
    x = draw(0, 15, 3)
    (placed,) = place(AxisType.Auto, (), (x,))
    np.testing.assert_allclose(jax.jit(lambda x: map_blocks(jnp.sin, x, block=4))(placed), np.sin(x), rtol=1e-5)


def test_rows_under_a_mesh_that_is_set_are_not_gathered():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded, everywhere = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    fn, rows, parameters = CASES["rms_norm"]
    with jax.set_mesh(mesh):
        run = jit_quickly(gradient(fn, (*rows, *parameters)), in_shardings=(sharded, everywhere))
        assert_only_sums_travel(run.lower(*rows, *parameters).compile())


def test_second_derivatives_with_sharded_rows_are_right_and_gather_none():
    fn, rows, parameters = CASES["linear_cross_entropy"]
    slope = lambda k, x, y: jax.grad(lambda k: fn(x, y, k))(k)
    run = jit_quickly(lambda x, y, k: jax.jvp(lambda k: slope(k, x, y), (k,), (k,))[1])
    placed = place(AxisType.Auto, rows, parameters)
    compiled = run.lower(*placed).compile()
    assert_only_sums_travel(compiled)
    assert_trees_close(compiled(*placed), run(*rows, *parameters), rtol=2e-4, atol=2e-5)
