"""Grouped products against one product a row in float64: values, derivatives of any order, ragged groups, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.experts.grouped_matmul import GroupedMatmulFunction, grouped_matmul
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad, saved_bytes, temp_bytes

SIZES = {
    "uneven": [3, 0, 5, 1, 2],
    "all in one": [0, 0, 11, 0, 0],
    "in the last": [0, 0, 0, 0, 11],
    "none": [0, 0, 0, 0, 0],
    "rows left over": [2, 2, 0, 1, 1],
    "more than there are": [4, 4, 4, 4, 4],
}


def draw(dtype=jnp.float64):
    return tuple(draw_normal(i, s, dtype) for i, s in enumerate([(11, 4), (5, 4, 3), (11, 3)]))


def plain(x, kernels, sizes):
    return GroupedMatmulFunction.surrogate(x, kernels, sizes, None, False)


@pytest.mark.parametrize("block", [1, 2, 4, 11, 64, None])
@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_are_those_of_one_product_a_row(name, block):
    with jax.enable_x64(True):
        x, kernels, dy = draw()
        sizes = jnp.array(SIZES[name])

        def run(fn):
            y, pull = jax.vjp(lambda x, k: fn(x, k, sizes), x, kernels)
            return y, pull(dy)

        ours, theirs = (jax.jit(lambda f=f: run(f))() for f in (lambda *a: grouped_matmul(*a, block_size=block), plain))
        assert_trees_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_it_is_the_ragged_dot_of_jax():
    x, kernels, _ = draw(jnp.float32)
    sizes = jnp.array(SIZES["uneven"])
    np.testing.assert_allclose(grouped_matmul(x, kernels, sizes), jax.lax.ragged_dot(x, kernels, sizes), rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_forward_mode_are_those_of_one_product_a_row():
    with jax.enable_x64(True):
        x, kernels, dy = draw()
        sizes = jnp.array(SIZES["uneven"])

        def all_orders(fn):
            loss = lambda x, k: (jnp.sin(fn(x, k, sizes)) * dy).sum()
            slope = lambda x, k: sum((g**2).sum() for g in jit_grad(loss, (0, 1))(x, k))
            return jax.grad(slope, (0, 1))(x, kernels), jax.jvp(loss, (x, kernels), (x, kernels)), jax.jvp(slope, (x, kernels), (x, kernels))

        ours, theirs = (jax.jit(lambda f=f: all_orders(f))() for f in (grouped_matmul, plain))
        assert_trees_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_batched_rows_and_sizes_are_those_of_each():
    with jax.enable_x64(True):
        x, kernels, _ = draw()
        xs, sizes = jnp.stack([x, 2 * x]), jnp.array([SIZES["uneven"], SIZES["all in one"]])
        ours = jax.jit(jax.vmap(grouped_matmul, (0, None, 0)))(xs, kernels, sizes)
        assert_trees_close(ours, jnp.stack([plain(a, kernels, s) for a, s in zip(xs, sizes, strict=True)]), rtol=1e-12, atol=1e-12)


def test_rows_and_kernels_of_no_group_are_never_touched():
    x, kernels, dy = draw(jnp.float32)
    sizes = jnp.array(SIZES["rows left over"])
    rows = jnp.arange(11)[:, None] < sizes.sum()
    bad_x, bad_kernels = jnp.where(rows, x, jnp.nan), kernels.at[2].set(jnp.nan)
    y, pull = jax.vjp(lambda x, k: grouped_matmul(x, k, sizes), bad_x, bad_kernels)
    expected, pull_good = jax.vjp(lambda x, k: grouped_matmul(x, k, sizes), x, kernels)
    assert_trees_close((y, pull(jnp.where(rows, dy, jnp.nan))), (expected, pull_good(dy)), rtol=1e-6)
    assert not y[6:].any() and not pull(dy)[0][6:].any() and not pull(dy)[1][2].any()


@pytest.mark.parametrize("shape", [((0, 4), (5, 4, 3)), ((11, 4), (0, 4, 3)), ((11, 0), (5, 0, 3))])
def test_no_rows_groups_or_features_are_zero(shape):
    x, kernels = (jnp.ones(s) for s in shape)
    sizes = jnp.full(len(kernels), 2)
    dx, dkernels = jit_grad(lambda x, k: grouped_matmul(x, k, sizes).sum(), (0, 1))(x, kernels)
    assert grouped_matmul(x, kernels, sizes).shape == (len(x), 3) and dx.shape == x.shape and dkernels.shape == kernels.shape
    assert not grouped_matmul(x, kernels, sizes).any()


def test_half_precision_is_added_up_in_float32():
    x, kernels = jnp.ones((300, 600), jnp.bfloat16), jnp.ones((2, 600, 4), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, k: grouped_matmul(x, k, jnp.array([290, 10])), x, kernels)
    dx, dkernels = pull(jnp.ones_like(y))
    assert y.dtype == dx.dtype == dkernels.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.full((300, 4), 600, jnp.bfloat16))
    np.testing.assert_array_equal(dkernels[:, 0, 0], jnp.array([290, 10], jnp.bfloat16))


def test_devices_multiply_their_own_rows():
    mesh = jax.sharding.Mesh(jax.devices(), ("rows",))
    x, kernels, _ = draw(jnp.float32)
    xs, sizes = jnp.tile(x, (8, 1)), jnp.tile(jnp.array(SIZES["uneven"]), 8)
    run = jax.jit(jax.shard_map(grouped_matmul, mesh=mesh, in_specs=(P("rows"), P(), P("rows")), out_specs=P("rows")))
    loss = lambda k: (run(xs, k, sizes) ** 2).sum()
    one = lambda k: 8 * (grouped_matmul(x, k, sizes[:5]) ** 2).sum()
    assert_trees_close(jit_value_and_grad(loss)(kernels), jit_value_and_grad(one)(kernels), rtol=1e-5)


def test_devices_may_share_the_sizes():
    mesh = jax.sharding.Mesh(jax.devices(), ("rows",))
    x, kernels, _ = draw(jnp.float32)
    sizes = jnp.array(SIZES["uneven"])
    run = jax.jit(jax.shard_map(grouped_matmul, mesh=mesh, in_specs=(P("rows"), P(), P()), out_specs=P("rows")))
    loss = lambda k: (run(jnp.tile(x, (8, 1)), k, sizes) ** 2).sum()
    one = lambda k: 8 * (grouped_matmul(x, k, sizes) ** 2).sum()
    assert_trees_close(jit_value_and_grad(loss)(kernels), jit_value_and_grad(one)(kernels), rtol=1e-5)


# Memory


def test_nothing_but_the_arguments_is_saved():
    x, kernels, _ = draw(jnp.float32)
    assert saved_bytes(lambda x, k: grouped_matmul(x, k, jnp.array(SIZES["uneven"])), x, kernels) <= 4 * 5


def test_memory_is_that_of_one_kernel_whatever_the_number_of_groups():
    x, kernels, dy = jnp.zeros((512, 64)), jnp.zeros((64, 64, 96)), jnp.zeros((512, 96))
    sizes = jnp.full(64, 8)
    step = lambda fn: lambda x, k, dy: jax.vjp(lambda x, k: fn(x, k, sizes), x, k)[1](dy)
    ours, theirs = (temp_bytes(step(fn), x, kernels, dy) for fn in (grouped_matmul, jax.lax.ragged_dot))
    assert ours <= 6 * kernels[0].nbytes + x.nbytes + dy.nbytes
    assert ours <= 0.1 * theirs


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((jnp.ones((3, 4)), jnp.ones((2, 5, 3)), jnp.array([1, 2])), ValueError, r"kernels has shape \(2, 5, 3\), but must be"),
        ((jnp.ones((3, 4)), jnp.ones((2, 4, 3)), jnp.array([1, 2, 3])), ValueError, r"group_sizes has shape \(3,\)"),
        ((jnp.ones((3, 4)), jnp.ones((2, 4, 3)), jnp.array([1.0, 2.0])), TypeError, "group_sizes is of dtype float32"),
        ((jnp.ones((2, 3, 4)), jnp.ones((2, 4, 3)), jnp.array([1, 2])), ValueError, "x has shape"),
    ],
    ids=range(4),
)
def test_bad_input_is_an_error(args, error, message):
    with pytest.raises(error, match=f"grouped_matmul: {message}"):
        grouped_matmul(*args)


def test_complex_rows_through_real_kernels_have_gradients_of_their_own_kinds():
    x, kernels = jax.random.normal(jax.random.key(0), (4, 3)) * (1 + 0.5j), jax.random.normal(jax.random.key(1), (2, 3, 2))
    loss = lambda product: lambda x, k: jnp.abs(product(x, k) - 1).sum()
    plain = lambda x, k: jnp.concatenate([x[:1] @ k[0], x[1:] @ k[1]])
    ours, theirs = (jax.jit(jax.grad(loss(f), (0, 1)))(x, kernels) for f in (lambda x, k: grouped_matmul(x, k, jnp.array([1, 3])), plain))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
