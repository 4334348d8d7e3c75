"""The barrier, which marks nothing as varying over a mesh that did not."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from layers.core import compat
from layers.core.recompute import barrier


def axes_of(*arrays):
    return ["".join(sorted(compat.varying_axes(jax.typeof(x)))) for x in arrays]


@pytest.mark.devices(2)
def test_arrays_are_the_same_and_vary_over_the_axes_that_they_varied_over():
    mesh, varied = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), []

    def part(x, w):
        (a, b), (c, none) = barrier((x, w), (2 * x, None))
        varied.extend(axes_of(a, b, c))
        assert none is None
        return a + b + c

    run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")))
    assert (run(jnp.arange(4.0), jnp.ones(2)) == 3 * jnp.arange(4.0) + 1).all()
    assert varied == ["d", "", "d"]


@pytest.mark.devices(4)
def test_all_that_may_wait_for_the_gradient_does_on_a_mesh_of_several_axes():
    """What differs over "m" alone cannot; what differs over "d" and "m" waits for a gradient that differs over "d"."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    varied, waiting = [], []

    def part(x, w, both, dy):
        given = x, w, both, dy
        (x, w, both), dy = barrier((x, w, both), dy)
        varied.extend(axes_of(x, w, both, dy))
        waiting.extend(i for i, (a, b) in enumerate(zip(given, (x, w, both, dy), strict=True)) if a is not b)
        return x + dy, w, both

    specs = P("d"), P("m"), P("d", "m"), P("d")
    args = jnp.arange(4.0), jnp.ones(4), jnp.ones((4, 4)), jnp.ones(4)
    run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=specs[:3]))
    assert (run(*args)[0] == jnp.arange(4.0) + 1).all()
    assert varied == ["d", "m", "dm", "d"]
    assert set(waiting) >= {0, 2, 3}


def test_without_a_mesh_everything_waits_for_the_gradient():
    program = jax.make_jaxpr(barrier)((1.0, 2.0), 3.0)
    assert [len(e.invars) for e in program.eqns if e.primitive.name == "optimization_barrier"] == [3]
