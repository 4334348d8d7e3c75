import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.trees import is_inexact, replaced


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_floating_point_and_complex_arrays_are_inexact(dtype):
    assert all(is_inexact(x) for x in (jnp.ones(2, dtype), np.ones(2, dtype), jax.ShapeDtypeStruct((2,), dtype)))


@pytest.mark.parametrize("x", [jnp.ones(2, int), jnp.ones(2, bool), jax.random.key(0), np.zeros(2, jax.dtypes.float0)], ids=lambda x: str(x.dtype))
def test_other_arrays_are_not(x):
    assert not is_inexact(x)


def test_replaced_leaves_are_a_new_list_of_the_others_and_the_values():
    leaves = ("a", "b", "c")
    assert replaced(leaves, [2, 0], iter("xy")) == ["y", "b", "x"]
    assert leaves == ("a", "b", "c")


@pytest.mark.parametrize("values", ["", "xyz"])
def test_as_many_leaves_are_replaced_as_values_are_given(values):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        replaced("abc", [0, 1], values)
