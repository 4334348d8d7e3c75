"""Loops that take their memory late give what `scan_blocks` gives, in place and in their turn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.core.blocks import scan_blocks
from layers.core.deferred import scan_blocks_deferred
from layers.core.recompute import no_barriers
from tests.core.functions import floats
from tests.support import assert_trees_close, temp_bytes


def body(sums, rows):
    dy, x = rows
    return sums + (x * dy).sum(0), jnp.cos(x) * dy


def loop(dy, x, block=2):
    return scan_blocks_deferred(body, jnp.zeros(x.shape[1:]), (dy, x), block=block)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("rows", [0, 7])
def test_result_is_that_of_scan_blocks(block, rows):
    dy, x = floats(rows, 3), floats(rows, 3, seed=1)
    assert_trees_close(loop(dy, x, block), scan_blocks(body, jnp.zeros(3), (dy, x), block=block), rtol=1e-6)


@pytest.mark.parametrize("first", [1.0, -1.0, jnp.nan, jnp.inf])
def test_zeros_are_zeros_whatever_the_gradient(first):
    dy = floats(7, 3).at[0, 0].set(first)
    sums, outs = loop(dy, floats(7, 3, seed=1))
    assert np.isfinite(sums[1:]).all() and np.isfinite(outs[1:]).all()


def test_loop_is_transposed_where_a_rule_is():
    x, dy, dx = floats(7, 3), floats(7, 3, seed=1), floats(7, 3, seed=2)
    with no_barriers():
        (back,) = jax.linear_transpose(lambda dy: loop(dy, x)[1], dy)(dx)
    np.testing.assert_allclose(back, jnp.cos(x) * dx, rtol=1e-6)


@pytest.mark.devices(4)
def test_rows_on_several_devices_are_not_gathered():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    dy, x = (jax.device_put(floats(16, 3, seed=i), jax.NamedSharding(mesh, P("d"))) for i in range(2))
    compiled = jax.jit(loop).lower(dy, x).compile()
    assert_trees_close(compiled(dy, x), body(jnp.zeros(3), (floats(16, 3), floats(16, 3, seed=1))), rtol=1e-5, atol=1e-6)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.devices(2)
def test_unvarying_rows_may_meet_a_varying_gradient_under_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    dy, x = floats(20, 3), floats(10, 3, seed=1)
    sharded = jax.shard_map(lambda dy, x: jax.tree.map(lambda y: y[None], loop(dy, x)), mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    expected = jax.tree.map(lambda *y: jnp.stack(y), *(loop(half, x) for half in jnp.split(dy, 2)))
    assert_trees_close(jax.jit(sharded)(dy, x), expected, rtol=1e-5, atol=1e-6)


def test_loops_one_after_the_other_do_not_hold_their_outputs_at_once():
    """Each makes a gradient of the parameters and one that only the next loop reads."""

    def chain(run):
        def program(dy, *xs):
            sums = []
            for x in xs:
                total, dy = run(dy, x)
                sums.append(total)
            return dy, sums

        return temp_bytes(program, *[jax.ShapeDtypeStruct((256, 64), jnp.float32)] * 13)

    early = chain(lambda dy, x: scan_blocks(body, jnp.zeros(64), (dy, x), block=32))
    assert chain(lambda dy, x: loop(dy, x, 32)) <= 0.35 * early
