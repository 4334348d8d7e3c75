"""Wide accumulation, products of matrices and a division that cannot fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.numerics import dot, safe_reciprocal, slope_along, wide
from layers.core.recompute import barrier


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64"), ("complex64",) * 2],
)
def test_wide_dtype_is_at_least_float32(dtype, expected):
    with jax.enable_x64(True):
        assert wide(jnp.dtype(dtype)) == jnp.dtype(expected)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [("bfloat16", "bfloat16", "float32"), ("float16", "bfloat16", "float32"), ("bfloat16", "float32", "float32"), ("float32", "float64", "float64")],
)
def test_product_of_matrices_is_in_the_wide_dtype_of_the_common_one(x, y, expected):
    with jax.enable_x64(True):
        assert dot("ij,jk->ik", jnp.ones((2, 3), x), jnp.ones((3, 4), y)).dtype == jnp.dtype(expected)


def test_product_of_16_bit_matrices_adds_up_in_32():
    x = jnp.concatenate([jnp.full((1, 1), 256, jnp.bfloat16), jnp.ones((1, 300), jnp.bfloat16)], 1)
    np.testing.assert_array_equal(dot("ij,kj->ik", x, jnp.ones_like(x)), [[556]])


def test_reciprocal_of_zero_is_zero_with_a_finite_derivative():
    x = jnp.array([0.0, 2.0, -0.5])
    np.testing.assert_allclose(safe_reciprocal(x), [0.0, 0.5, -2.0])
    np.testing.assert_allclose(jax.grad(lambda x: safe_reciprocal(x).sum())(x), [0.0, -0.25, -4.0])
    np.testing.assert_allclose(jax.jvp(safe_reciprocal, (x,), (jnp.ones(3),))[1], [0.0, -0.25, -4.0])


def test_slope_takes_0_times_anything_for_0():
    gradient, tangent = jnp.array([2.0, 0.0, jnp.inf, jnp.nan, 3.0]), jnp.array([0.5, jnp.inf, 0.0, 0.0, 0.0])
    assert slope_along(gradient, tangent) == 1
    assert jnp.isnan(slope_along(gradient, tangent.at[3].set(1.0)))
    np.testing.assert_array_equal(jax.grad(slope_along, 1)(gradient, tangent)[jnp.array([0, 4])], [2.0, 3.0])


def test_barrier_changes_no_value_and_no_structure():
    given = barrier({"x": jnp.ones(2), "none": None}, (jnp.zeros(3),))
    assert jax.tree.structure(given) == jax.tree.structure(({"x": 0, "none": None}, (0,)))
    np.testing.assert_array_equal(given[0]["x"], jnp.ones(2))
