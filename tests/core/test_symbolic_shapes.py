"""Layers are exported for a symbolic number of rows (`jax.export`), and give for any number what they give without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.blocks import block_size, by_device, fold_blocks, scan_blocks
from layers.core.deferred import scan_blocks_deferred
from layers.core.hashing import hash_bits
from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.linear_jsd import linear_jsd
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
from layers.regularization.dropout import dropout
from tests.core.functions import floats
from tests.families import BLOCKS, names_of_layers_that_call
from tests.support import assert_trees_close

FEATURES, HIDDEN = 4, 6
KEY = jax.random.key(0)
ONE, KERNEL, OTHER = 1 + floats(FEATURES), floats(FEATURES, HIDDEN, seed=1), floats(FEATURES, HIDDEN, seed=2)


def labels_of(x):
    return jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % HIDDEN


LAYERS = {
    "dropout": lambda x, w: dropout(x * w[0, 0], KEY, rate=0.4),
    "dropout with broadcast dims": lambda x, w: dropout(x * w[0, 0], KEY, rate=0.4, broadcast_dims=(1,)),
    "rms_norm": lambda x, w: rms_norm(x, w[:, 0]),
    "layer_norm": lambda x, w: layer_norm(x, w[:, 0], w[:, 1]),
    "add_rms_norm": lambda x, w: add_rms_norm(x, x * x, w[:, 0]),
    "add_layer_norm": lambda x, w: add_layer_norm(x, x * x, w[:, 0], w[:, 1]),
    "linear_cross_entropy": lambda x, w: linear_cross_entropy(x, w, labels_of(x), w[0], label_smoothing=0.1),
    "linear_cross_entropy of each row": lambda x, w: linear_cross_entropy(x, w, labels_of(x), reduction="none", block_size=2),
    "linear_jsd": lambda x, w: linear_jsd(x, w, x, OTHER),
    "softmax_cross_entropy": lambda x, w: softmax_cross_entropy(x @ w, labels_of(x), label_smoothing=0.1),
    "softmax_cross_entropy of each row": lambda x, w: softmax_cross_entropy(x @ w, labels_of(x), reduction="none", block_size=2),
    "batch_norm": lambda x, w: batch_norm(x, w[:, 0], w[:, 1])[0],
    "group_norm": lambda x, w: group_norm(x, w[:, 0], w[:, 1], num_groups=2),
    "vector_quantize": lambda x, w: vector_quantize(x, w.T)[0],
    "residual_vector_quantize": lambda x, w: residual_vector_quantize(x, [w.T, w.T / 2])[0],
    "mlp": lambda x, w: mlp(x, w, OTHER.T),
    "mlp with a block size": lambda x, w: mlp(x, w, OTHER.T, block_size=2),
    "gated_mlp": lambda x, w: gated_mlp(x, w, w * w, OTHER.T),
}


def test_every_layer_that_goes_in_blocks_is_here():
    assert names_of_layers_that_call(BLOCKS) <= {name.split()[0] for name in LAYERS}


def exported(fn, *shapes):
    """`fn` for float32 arrays of shapes that may name dimensions."""
    scope = jax.export.SymbolicScope()
    args = [jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), jnp.float32) for shape in shapes]
    return jax.export.export(jax.jit(fn))(*args).call


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_its_gradient_are_exported_for_any_batch(name):
    def of(x, w):
        y, pull = jax.vjp(LAYERS[name], x, w)
        return y, pull(jax.tree.map(jnp.cos, y))

    call, x = exported(of, f"b, 3, {FEATURES}", f"{FEATURES}, {HIDDEN}"), floats(5, 3, FEATURES, seed=3)
    assert_trees_close(call(x, KERNEL), jax.jit(of)(x, KERNEL), rtol=2e-5, atol=2e-6)


def test_batch_may_be_a_sum_that_can_be_zero():
    of = lambda x: jax.value_and_grad(lambda x: (mlp(layer_norm(x), KERNEL, OTHER.T) ** 2).sum())(x)
    call = exported(of, f"b - 1, 3, {FEATURES}")
    for batch in (0, 2):
        x = floats(batch, 3, FEATURES)
        assert_trees_close(call(x), jax.jit(of)(x), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", ["b, 5, 4", "3, b, 4", "3, 5, b", "b, 5, t"])
def test_hash_of_a_symbolic_shape_has_no_word_twice(shape):
    bits = exported(lambda x: hash_bits(jax.random.key_data(KEY), x.shape), shape)(jnp.zeros((3, 5, 4)))
    assert len(np.unique(np.asarray(bits))) == 60


@pytest.mark.parametrize("shape", ["b, 5, 4", "b, 1, 4"])
def test_hash_of_a_symbolic_batch_is_that_of_its_size(shape):
    x = jnp.zeros((3, 5 if "5" in shape else 1, 4))
    words = jax.random.key_data(KEY)
    np.testing.assert_array_equal(exported(lambda x: hash_bits(words, x.shape), shape)(x), hash_bits(words, x.shape))


@pytest.mark.parametrize("loop", [scan_blocks, fold_blocks, scan_blocks_deferred])
def test_loop_over_a_symbolic_number_of_rows_is_one_block(loop):
    sizes = []

    def body(sums, rows):
        sizes.append(rows.shape[0])
        return sums + rows.sum(0), jnp.cos(rows)

    call = exported(lambda x: loop(body, jnp.zeros(3), x, block=2), "b, 3")
    assert len(sizes) == 1 and jax.export.is_symbolic_dim(sizes[0])
    assert_trees_close(call(floats(7, 3)), (floats(7, 3).sum(0), jnp.cos(floats(7, 3))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [None, 2])
def test_block_of_a_symbolic_number_of_rows_has_all(asked):
    (rows,) = jax.export.symbolic_shape("b")
    assert block_size(rows, 4, asked) is rows


def test_symbolic_rows_are_not_split_between_devices():
    mesh, given = jax.sharding.AbstractMesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), []
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        for x in (floats(4, 3), rows):
            jax.eval_shape(lambda x: by_device(lambda sums, x: (given.append(x.shape), (sums, x))[1], None, x), x)
    assert given == [(2, 3), rows.shape]
