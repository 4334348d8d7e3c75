"""Normalisations of what is huge, and of what is hidden under a mask; scales that are kept as their difference from 1."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers.core import roots
from layers.norms import statistics
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad

ROWS = {
    "rms_norm": layers.rms_norm,
    "layer_norm": layers.layer_norm,
    "add_rms_norm": lambda x, **k: layers.add_rms_norm(x, jnp.zeros_like(x), **k)[0],
    "add_layer_norm": lambda x, **k: layers.add_layer_norm(x, jnp.zeros_like(x), **k)[0],
    "group_norm": partial(layers.group_norm, num_groups=1),
    "batch_norm": lambda x, **k: layers.batch_norm(x.T, **k)[0].T,
}
EVERY = pytest.mark.parametrize("name", ROWS)
HUGE = jnp.array([[3e38, -3e38, 2e38, 1e38], [3.0, -3.0, 2.0, 1.0], [1e20, -1e20, 3e20, 0.0], [3e38, 3e38, 3e38, -3e38]])
"""Rows whose squares or whose sums overflow, and one that is ordinary."""


@pytest.mark.parametrize("accelerator", [False, True])
@EVERY
def test_huge_rows_are_normalised_as_in_float64(name, accelerator, monkeypatch):
    monkeypatch.setattr(roots, "on_accelerator", lambda: accelerator)
    y, pull = jax.vjp(ROWS[name], HUGE)
    with jax.enable_x64(True):
        exact, exact_pull = jax.vjp(ROWS[name], HUGE.astype(jnp.float64))
        expected = exact_pull(jnp.cos(exact))[0]
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.cos(y))[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accelerator", [False, True])
@EVERY
def test_tiny_rows_without_epsilon_are_normalised_as_in_float64(name, accelerator, monkeypatch):
    """Rows whose squares are 0, one that is ordinary, and one whose squares are lost in part."""
    monkeypatch.setattr(roots, "on_accelerator", lambda: accelerator)
    x = jnp.asarray(draw_normal(1, (4, 5)) * jnp.array([[1e-30], [1.0], [1e-33], [1e-19]]))
    run = lambda x: ROWS[name](x, epsilon=0.0)
    y, pull = jax.vjp(run, x)
    with jax.enable_x64(True):
        exact, exact_pull = jax.vjp(run, x.astype(jnp.float64))
        expected = np.asarray(exact_pull(1e-9 * jnp.cos(exact))[0])
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5)
    largest = np.abs(expected).max(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(pull(1e-9 * jnp.cos(y))[0], np.float64) / largest, expected / largest, atol=1e-4)


@EVERY
def test_huge_gradient_of_a_huge_row_is_that_of_float64(name):
    x, dy = draw_normal(1, (2, 3, 300)) * jnp.array([1e30, 1e12])[:, None, None]
    dx = jax.vjp(ROWS[name], x)[1](dy)[0]
    with jax.enable_x64(True):
        expected = np.asarray(jax.vjp(ROWS[name], x.astype(jnp.float64))[1](dy.astype(jnp.float64))[0])
    np.testing.assert_allclose(dx, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.1, 1e-10, 7.1e15])
def test_row_of_equal_numbers_gives_zeros(value, epsilon):
    np.testing.assert_array_equal(layers.layer_norm(jnp.full((2, 7), value), epsilon=epsilon), jnp.zeros((2, 7)))


def test_huge_rows_are_normalised_in_blocks_too(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_BYTES", 4 * 4 * 2)
    scale = jnp.ones(4)
    dscale = jit_grad(lambda s: (layers.layer_norm(HUGE, s) * jnp.arange(4.0)).sum())(scale)
    monkeypatch.undo()
    np.testing.assert_allclose(dscale, (layers.layer_norm(HUGE) * jnp.arange(4.0)).sum(0), rtol=1e-5)


@pytest.mark.parametrize("norm", [layers.rms_norm, partial(layers.layer_norm, epsilon=0.0)])
def test_row_of_the_largest_number_has_entries_of_at_most_one(norm):
    y = norm(jnp.full((1, 6), jnp.finfo(jnp.float32).max))
    assert jnp.isfinite(y).all()
    assert (jnp.abs(y) <= 1.001).all()


def test_batch_of_huge_rows_under_vmap_is_each_alone():
    np.testing.assert_array_equal(jax.vmap(layers.layer_norm)(HUGE), layers.layer_norm(HUGE))


MODULES = {
    "RMSNorm": partial(layers.RMSNorm, 6),
    "LayerNorm": partial(layers.LayerNorm, 6),
    "GroupNorm": partial(layers.GroupNorm, 6, 2),
    "BatchNorm": partial(layers.BatchNorm, 6),
}


@pytest.mark.parametrize("hidden", [jnp.nan, jnp.inf, 3e38])
@pytest.mark.parametrize("name", MODULES)
def test_what_is_masked_is_never_touched(name, hidden):
    """Where the gradient of masked outputs is zero: neither a value beside them nor a gradient depends on what is hidden."""
    x = draw_normal(1, (3, 5, 6))
    mask = jnp.ones((3, 5, 6), bool).at[0, 1, 2].set(False).at[2, 4, ::2].set(False).at[:, 0].set(False)
    module = MODULES[name](rngs=nnx.Rngs(0))

    def run(x, mask):
        return nnx.value_and_grad(lambda m, x: jnp.where(mask, jnp.sin(m(x, mask=mask)) * jnp.arange(6), 0).sum(), argnums=(0, 1))(module, x)

    value, (dmodule, dx) = run(jnp.where(mask, x, hidden), mask)
    expected, (dmodule_, dx_) = run(jnp.where(mask, x, 0), mask)
    shown = lambda value, grads, dx: (value, nnx.to_pure_dict(grads), jnp.where(mask, dx, 0))
    assert jnp.isfinite(dx).all()
    assert_trees_close(shown(value, dmodule, dx), shown(expected, dmodule_, dx_), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_mask_of_zeros_and_ones_is_one_of_bool(dtype):
    x, mask = draw_normal(1, (3, 6)), jnp.arange(18).reshape(3, 6) % 3 != 1
    module = layers.LayerNorm(6, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module(x, mask=mask.astype(dtype)), module(x, mask=mask))


def test_scale_offset_is_a_larger_scale():
    x, residual, scale = draw_normal(1, (3, 4, 6))
    run = lambda fn: jit_value_and_grad(lambda x, s: jnp.sin(fn(x, s)).sum(), (0, 1))(x, scale[0])
    assert_trees_close(run(partial(layers.rms_norm, scale_offset=1)), run(lambda x, s: layers.rms_norm(x, 1 + s)), rtol=1e-6, atol=1e-6)
    fused = lambda offset, x, s: sum(layers.add_rms_norm(x, residual, s, scale_offset=offset))
    assert_trees_close(run(partial(fused, 1.0)), run(lambda x, s: fused(0.0, x, 1 + s)), rtol=1e-6, atol=1e-6)


def test_small_scale_beside_its_offset_is_not_rounded_away_in_half_precision():
    x, scale = jnp.ones(6, jnp.bfloat16), jnp.full(6, 1e-3, jnp.bfloat16)
    np.testing.assert_array_equal(jit_grad(lambda s: layers.rms_norm(x, s, scale_offset=1.0).sum())(scale), jnp.ones(6, jnp.bfloat16))
    assert statistics.factor(scale, 1.0).dtype == jnp.float32


def test_module_with_an_offset_starts_as_one_without():
    module, x = layers.RMSNorm(6, scale_offset=1.0, rngs=nnx.Rngs(0)), draw_normal(1, (3, 6))
    np.testing.assert_array_equal(module.scale[...], jnp.zeros(6))
    np.testing.assert_allclose(module(x), layers.RMSNorm(6, rngs=nnx.Rngs(0))(x), rtol=1e-6)


def test_epsilon_may_be_traced():
    x = draw_normal(1, (3, 6))
    for fn in ROWS.values():
        np.testing.assert_allclose(jax.jit(lambda x, e, fn=fn: fn(x, epsilon=e))(x, 1e-3), fn(x, epsilon=1e-3), rtol=1e-6)
