"""Wide accumulation and a division that cannot fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.numerics import safe_reciprocal, wide
from layers.core.recompute import barrier


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64"), ("complex64",) * 2],
)
def test_wide_dtype_is_at_least_float32(dtype, expected):
    with jax.enable_x64(True):
        assert wide(jnp.dtype(dtype)) == jnp.dtype(expected)


def test_reciprocal_of_zero_is_zero_with_a_finite_derivative():
    x = jnp.array([0.0, 2.0, -0.5])
    np.testing.assert_allclose(safe_reciprocal(x), [0.0, 0.5, -2.0])
    np.testing.assert_allclose(jax.grad(lambda x: safe_reciprocal(x).sum())(x), [0.0, -0.25, -4.0])
    np.testing.assert_allclose(jax.jvp(safe_reciprocal, (x,), (jnp.ones(3),))[1], [0.0, -0.25, -4.0])


def test_barrier_changes_no_value_and_no_structure():
    given = barrier({"x": jnp.ones(2), "none": None}, (jnp.zeros(3),))
    assert jax.tree.structure(given) == jax.tree.structure(({"x": 0, "none": None}, (0,)))
    np.testing.assert_array_equal(given[0]["x"], jnp.ones(2))
