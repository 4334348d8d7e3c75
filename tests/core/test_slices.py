"""The slice that XLA leaves in its loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layers.core.slices import slice_here
from tests.support import temp_bytes

ROWS, BLOCK = 4096, 64


@pytest.mark.parametrize(("axis", "size"), [(0, 2), (1, 3)])
def test_values_and_derivatives_are_those_of_a_slice(axis, size):
    x = jax.random.normal(jax.random.key(0), (5, 7))
    along = jnp.cos(x)

    def derivatives(take):
        cube = lambda x: jnp.sum(take(x, 2, size, axis) ** 3)
        grad = jax.grad(cube)
        curvatures = jax.jvp(grad, (x,), (along,))[1], jax.grad(lambda x: jnp.vdot(grad(x), along))(x)
        return take(x, 2, size, axis), jax.jvp(cube, (x,), (along,))[1], grad(x), *curvatures

    for got, expected in zip(derivatives(slice_here), derivatives(lax.dynamic_slice_in_dim), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_vmap_takes_a_slice_of_each():
    x, starts = jnp.arange(24).reshape(2, 3, 4), jnp.array([0, 1])
    got = jax.vmap(lambda x, start: slice_here(x, start, 2, 0))(x, starts)
    np.testing.assert_array_equal(got, jnp.stack([x[0, :2], x[1, 1:]]))


def test_loop_makes_no_wide_copy_of_a_16_bit_array():
    x = jax.ShapeDtypeStruct((ROWS, 64), jnp.bfloat16)

    def sums(x):
        step = lambda total, start: (total + slice_here(x, start, BLOCK, 0).astype(jnp.float32), None)
        return lax.scan(step, jnp.zeros((BLOCK, 64)), jnp.arange(0, ROWS, BLOCK))[0]

    assert temp_bytes(sums, x) < x.size * 4 / 8
