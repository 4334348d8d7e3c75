"""The barrier that marks nothing as varying over a mesh that did not."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from layers.core import compat
from layers.core.varying_barrier import varying_barrier


@pytest.mark.devices(2)
def test_arrays_are_the_same_and_vary_over_the_axes_that_they_varied_over():
    mesh, varied = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), []

    def part(x, w):
        (a, b), (c, none) = varying_barrier((x, w), (2 * x, None))
        varied.extend(bool(compat.varying_axes(jax.typeof(y))) for y in (a, b, c))
        assert none is None
        return a + b + c

    run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")))
    assert (run(jnp.arange(4.0), jnp.ones(2)) == 3 * jnp.arange(4.0) + 1).all()
    assert varied == [True, False, True]


def test_without_a_mesh_everything_waits_for_the_gradient():
    program = jax.make_jaxpr(varying_barrier)((1.0, 2.0), 3.0)
    assert [len(e.invars) for e in program.eqns if e.primitive.name == "optimization_barrier"] == [3]
