"""Gradient clipping and gradient noise, which no function has as its gradient, under every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from layers.surgery.add_gradient_noise import add_gradient_noise
from layers.surgery.clip_gradient import clip_gradient
from tests.support import jit_grad, mesh_of

X = jnp.array([[-2.0, -0.5, 0.0], [0.25, 1.0, 3.0]])
DY = jnp.array([[1.0, -2.0, 0.5], [0.0, 4.0, -0.25]])
KEY = jax.random.key(0)
automatic = partial(mesh_of, 2, "d", jax.sharding.AxisType.Auto)

LAYERS = {
    "clip by value": lambda x: clip_gradient(x, max_value=0.75),
    "clip by norm": lambda x: clip_gradient(x, max_norm=1.5),
    "clip by both": lambda x: clip_gradient(x, max_value=2.0, max_norm=1.5),
    "noise": lambda x: add_gradient_noise(x, KEY, stddev=0.1),
}
NOISE = 0.1 * jax.random.normal(jax.random.split(KEY, 1)[0], X.shape)


def rule(name, dy):
    """What comes back for the gradient `dy` of the whole array."""
    if name == "noise":
        return dy + NOISE
    dy = np.clip(dy, -0.75, 0.75) if name == "clip by value" else np.clip(dy, -2, 2) if name == "clip by both" else np.asarray(dy)
    return dy if name == "clip by value" else dy * min(1, 1.5 / np.linalg.norm(dy))


EVERY = pytest.mark.parametrize("name", LAYERS)


def loss(fn, x, dy=DY):
    return (fn(x) * dy).sum()


@EVERY
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))], ids=["jit", "remat", "jit of remat"])
def test_compiled_and_recomputed(name, wrap):
    np.testing.assert_allclose(jax.jit(jax.grad(wrap(lambda x: loss(LAYERS[name], x))))(X), rule(name, DY), rtol=1e-6)


@EVERY
def test_vmap_of_the_gradient_treats_each_example_for_itself(name):
    batch = jnp.stack([DY, 3 * DY])
    given = jax.jit(jax.vmap(jax.grad(lambda x, dy: loss(LAYERS[name], x, dy)), (None, 0)))(X, batch)
    np.testing.assert_allclose(given, np.stack([rule(name, dy) for dy in batch]), rtol=1e-6)


@EVERY
def test_gradient_of_vmap_treats_each_example_for_itself(name):
    batch = jnp.stack([DY, 3 * DY])
    given = jax.jit(jax.grad(lambda x: jax.vmap(lambda x, dy: loss(LAYERS[name], x, dy))(x, batch).sum()))(jnp.stack([X, X]))
    np.testing.assert_allclose(given, np.stack([rule(name, dy) for dy in batch]), rtol=1e-6)


@EVERY
def test_scan_applies_the_rule_at_each_step(name):
    def run(x):
        return jax.lax.scan(lambda x, _: (LAYERS[name](2 * x), None), x, None, length=3)[0]

    expected = DY
    for _ in range(3):
        expected = 2 * np.asarray(rule(name, expected))
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: loss(run, x)))(X), expected, rtol=1e-6)


@EVERY
def test_jit_over_devices_takes_the_whole_array(name):
    placed = jax.device_put(X, NamedSharding(automatic(), P("d")))
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: loss(LAYERS[name], x)))(placed), rule(name, DY), rtol=1e-6)


@EVERY
def test_shard_map_takes_the_part_of_each_device(name):
    each = jax.shard_map(lambda x, dy: loss(LAYERS[name], x, dy)[None], mesh=automatic(), in_specs=P("d"), out_specs=P("d"))
    given = jax.jit(jax.grad(lambda x: each(x, DY).sum()))(X)
    if name == "noise":
        part = 0.1 * jax.random.normal(jax.random.split(KEY, 1)[0], (1, 3))
        np.testing.assert_allclose(given, DY + part, rtol=1e-6)
    else:
        np.testing.assert_allclose(given, np.concatenate([rule(name, DY[i : i + 1]) for i in range(2)]), rtol=1e-6)


@EVERY
def test_shard_map_of_what_all_devices_share_takes_the_sum_of_their_gradients(name):
    each = jax.shard_map(lambda x, s: s * loss(LAYERS[name], x)[None], mesh=automatic(), in_specs=(P(), P("d")), out_specs=P("d"))
    given = jax.jit(jax.grad(lambda x: each(x, jnp.array([1.0, 2.0])).sum()))(X)
    np.testing.assert_allclose(given, rule(name, 3 * DY), rtol=1e-6)


@EVERY
def test_forward_mode_is_that_of_the_identity(name):
    f = LAYERS[name]
    np.testing.assert_array_equal(jax.jvp(f, (X,), (DY,))[1], DY)
    np.testing.assert_array_equal(jax.linearize(f, X)[1](DY), DY)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda t: jax.jvp(f, (X,), (t,))[1]))(jnp.stack([DY, -DY])), jnp.stack([DY, -DY]))


@EVERY
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda x: loss(LAYERS[name], x)))(X)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype(name, dtype):
    given = jit_grad(lambda x: loss(LAYERS[name], x, DY.astype(dtype)))(X.astype(dtype))
    assert given.dtype == dtype
    tolerance = 0.05 if name == "noise" else 4 * float(jnp.finfo(dtype).eps)
    if name != "noise":
        np.testing.assert_allclose(given.astype(jnp.float32), rule(name, DY), rtol=tolerance)
    assert np.isfinite(given.astype(jnp.float32)).all()


@EVERY
def test_an_empty_array_is_left_alone(name):
    assert jit_grad(lambda x: LAYERS[name](x).sum())(jnp.zeros((0, 3))).shape == (0, 3)


def test_keys_of_a_batch_give_each_example_its_noise():
    keys = jax.random.split(KEY, 2)
    grads = jax.vmap(jax.grad(lambda x, key: add_gradient_noise(x, key, stddev=1.0).sum()), (None, 0))(X, keys)
    assert (grads[0] != grads[1]).all()


def test_a_large_gradient_in_half_precision_has_a_finite_norm():
    dy = jnp.full((2, 3), 60000.0, jnp.float16)
    given = jit_grad(lambda x: (clip_gradient(x, max_norm=1.0) * dy).sum())(X.astype(jnp.float16))
    np.testing.assert_allclose(given.astype(jnp.float32), np.full((2, 3), 6**-0.5), rtol=2e-3)
