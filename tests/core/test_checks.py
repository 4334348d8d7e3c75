import jax.numpy as jnp
import pytest

from layers.core.checks import check_floating


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_array_that_is_not_floating_is_named_with_the_cure(dtype):
    with pytest.raises(TypeError, match=r"layer: kernel is of dtype .*, but must be of a real floating.*cast it, kernel.astype\('float32'\)"):
        check_floating("layer", x=jnp.ones(2), bias=None, kernel=jnp.ones(2, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_floating_arrays_pass(dtype):
    check_floating("layer", x=jnp.ones(2, dtype), bias=None)
