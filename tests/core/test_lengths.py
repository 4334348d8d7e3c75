"""Lengths of vectors whose squares overflow or underflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.lengths import length, power_of_two, row_lengths

SIZES = [1.5e38, 1e20, 3.0, 1e-20, 2e-38, 0.0]


@pytest.mark.parametrize("size", SIZES)
def test_length_of_any_finite_vector_is_right(size):
    x = size * jnp.array([[1.0, -0.5], [0.25, 1.0]])
    expected = np.linalg.norm(np.asarray(x, np.float64))
    np.testing.assert_allclose(jax.jit(length)([x[0], x[1]]), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(row_lengths)(x)[:, 0], np.linalg.norm(np.asarray(x, np.float64), axis=-1), rtol=1e-6)


def test_length_of_bfloat16_and_complex_arrays_is_real_and_wide():
    both = length([jnp.full(3, 1e30, jnp.bfloat16), jnp.full(2, 1e30 + 1e30j)])
    assert both.dtype == jnp.float32
    np.testing.assert_allclose(both, 1e30 * 7**0.5, rtol=1e-2)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_length_of_what_is_not_finite_shows(bad):
    assert not np.isfinite(length([jnp.array([1.0, bad])]))
    assert not np.isfinite(row_lengths(jnp.array([1.0, bad])))


def test_no_entries_have_length_zero():
    assert length([]) == 0 and length([jnp.ones(0)]) == 0


@pytest.mark.parametrize("size", [3e38, 1e-40, 0.0, -1.0, np.inf, np.nan])
def test_power_of_two_and_its_reciprocal_are_normal_numbers(size):
    power = jax.jit(power_of_two)(jnp.float32(size))
    limits = np.finfo(np.float32)
    assert limits.tiny <= power and 1 / power >= limits.tiny


@pytest.mark.parametrize("size", SIZES)
def test_length_of_a_constant_is_right_when_it_is_compiled(size):
    np.testing.assert_allclose(jax.jit(lambda: length([jnp.full(4, size, jnp.float32)]))(), 2 * np.float32(size), rtol=1e-6)
