"""Loops over blocks of rows give what one pass over all rows gives, whatever the block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.core.blocks import block_size, map_blocks, scan_blocks
from tests.core.functions import floats
from tests.support import assert_trees_close

ROWS = floats(7, 3)


def body(carry, rows):
    return carry + jnp.sin(rows).sum(0), jnp.cos(rows)


@pytest.mark.parametrize("block", [1, 2, 3, 6, 7, 10])
def test_blocks_of_any_size_give_the_same_result(block):
    carry, outs = jax.jit(lambda x: scan_blocks(body, jnp.zeros(3), x, block=block))(ROWS)
    assert_trees_close((carry, outs), body(jnp.zeros(3), ROWS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [2, 7])
def test_no_rows_give_the_first_carry_and_no_outputs(block):
    carry, outs = scan_blocks(body, jnp.ones(3), jnp.zeros((0, 3)), block=block)
    assert outs.shape == (0, 3)
    np.testing.assert_array_equal(carry, jnp.ones(3))


def test_map_over_blocks_of_a_pytree_is_the_function_of_all_rows():
    fn = lambda rows: {"y": rows[0] * rows[1][:, :1]}
    arrays = (ROWS, floats(7, 2, seed=1))
    assert_trees_close(map_blocks(fn, arrays, block=3), fn(arrays), rtol=1e-6)


def test_loop_has_the_gradient_of_one_pass_in_both_modes():
    def total(block):
        return lambda x: sum((a**2).sum() for a in scan_blocks(body, jnp.zeros(3), x, block=block))

    assert_trees_close(jax.jit(jax.grad(total(3)))(ROWS), jax.jit(jax.grad(total(7)))(ROWS), rtol=1e-4, atol=1e-5)
    assert_trees_close(jax.jvp(total(3), (ROWS,), (ROWS,)), jax.jvp(total(7), (ROWS,), (ROWS,)), rtol=1e-4)


@pytest.mark.devices(2)
def test_unvarying_carry_may_meet_varying_rows_under_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    local = lambda x: scan_blocks(body, jnp.zeros(3), x, block=2)[0][None]
    given = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(floats(10, 3))
    expected = [body(jnp.zeros(3), half)[0] for half in jnp.split(floats(10, 3), 2)]
    np.testing.assert_allclose(given, jnp.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 5, 12, 13, 64, 100])
@pytest.mark.parametrize("target", [1, 4, 16])
def test_block_size_is_at_most_the_target_and_divides_where_it_can(length, target):
    block = block_size(length, target)
    assert 1 <= block <= target
    divides = any(length % b == 0 for b in range(target // 2 + 1, target + 1))
    if length > target and divides:
        assert length % block == 0
