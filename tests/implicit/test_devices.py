"""Implicit layers on a batch that lies over the devices of a mesh are those of one device: each solves for its own, whatever runs in f."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.implicit.argmin import argmin
from layers.implicit.fixed_point import fixed_point
from tests.support import assert_trees_close, draw_normal, jit_value_and_grad

TIGHT = {"tol": 1e-12, "backward_tol": 1e-12}


def arguments(dtype=jnp.float64):
    return draw_normal(0, (3, 3), dtype) / 4, draw_normal(1, (8, 3), dtype)


def both(fn):
    return jit_value_and_grad(lambda w, u: jnp.sum(jnp.sin(fn(w, u)) * jnp.arange(1.0, 4)), (0, 1))


def contraction(z, w, u):
    """With a function that is compiled by itself, a loop and a branch, which all read what is the same on all devices."""
    h = jax.nn.gelu(z @ w + u)
    h = jax.lax.scan(lambda c, k: (jnp.tanh(c @ w * k) + u / 8, None), h, jnp.array([0.3, 0.2]))[0]
    return jax.lax.cond(w.sum() > 9, lambda h: h, lambda h: h / 2 + jnp.where(h > 0, h / 9, w[0]), h)


def by_iteration(w, u):
    return jax.lax.scan(lambda z, _: (contraction(z, w, u), None), jnp.zeros_like(u), None, length=60)[0]


SOLVES = {
    "fixed_point": lambda w, u, zeros: fixed_point(contraction, zeros, w, u, **TIGHT)[0],
    "argmin": lambda w, u, zeros: argmin(lambda z: jnp.sum((z - u) ** 2) + jnp.sum(jnp.cosh(z @ w)), zeros, **TIGHT)[0],
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", SOLVES)
def test_shard_map_solves_for_each_device_from_a_start_that_all_share(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.enable_x64(True):
        args, zeros = arguments(), jnp.zeros((1, 3), jnp.float64)
        run = jax.shard_map(lambda w, u: SOLVES[name](w, u, zeros), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        one = by_iteration if name != "argmin" else lambda w, u: SOLVES[name](w, u, jnp.zeros_like(u))
        assert_trees_close(jax.device_get(jax.jit(both(run))(*args)), jax.device_get(jax.jit(both(one))(*args)), rtol=1e-9, atol=1e-10)


@pytest.mark.devices(8)
def test_leaves_that_devices_share_are_solved_beside_those_that_they_do_not():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shared = lambda z, w: jnp.tanh(z @ w) + w[0]
    pair = lambda w, u: fixed_point(lambda z: (jnp.tanh(z[0] @ w) + u, shared(z[1], w)), (jnp.zeros((1, 3)), jnp.zeros(3)))[0]
    run = jax.jit(jax.shard_map(pair, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
    w, u = arguments(jnp.float32)
    z, same = run(w, u)
    assert_trees_close((z, same), (jnp.tanh(z @ w) + u, shared(same.reshape(8, 3), w).reshape(-1)), rtol=1e-4, atol=1e-4)


def least(z, w, u):
    return jnp.sum((z - u) ** 2) + jnp.sum(jnp.cosh(z @ w))


ALONG_AN_AXIS = {
    "anderson": lambda w, u: fixed_point(lambda z: jnp.tanh(z @ w) + u, jnp.zeros(u.shape), solver="anderson", **TIGHT)[0],
    "broyden": lambda w, u: fixed_point(lambda z: jnp.tanh(z @ w) + u, jnp.zeros(u.shape), solver="broyden", **TIGHT)[0],
    "newton": lambda w, u: argmin(lambda z: least(z, w, u), jnp.zeros_like(u), **TIGHT)[0],
    "lbfgs": lambda w, u: argmin(lambda z: least(z, w, u), jnp.zeros_like(u), solver="lbfgs", **TIGHT)[0],
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ALONG_AN_AXIS)
def test_batch_along_an_explicit_axis_has_the_values_and_gradients_of_one_device(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.enable_x64(True):
        w, u = arguments()
        run = jax.jit(both(ALONG_AN_AXIS[name]))
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((w, P()), (u, P("data")))]
        assert_trees_close(jax.device_get(run(*placed)), jax.device_get(run(w, u)), rtol=1e-9, atol=1e-10)
