import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.rows import as_rows


@pytest.mark.parametrize(("batch", "shape"), [(None, (6, 4)), ((2, 3), (6, 4)), ((2,), (2, 3, 4)), ((), (1, 2, 3, 4)), ((2, 3, 4), (24,))])
def test_rows_have_one_axis_in_place_of_the_batch(batch, shape):
    x = jnp.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(as_rows(x, batch), np.arange(24).reshape(shape))


def test_empty_batch_has_no_rows():
    assert as_rows(jnp.ones((3, 0, 4))).shape == (0, 4)
