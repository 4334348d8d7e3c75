"""Good calls of `linear`, for `tests/test_bad_input.py`."""

import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal

X, KERNEL = draw_normal(0, (5, 3)), draw_normal(1, (3, 4))

CALLS = {
    "linear": lambda: {"x": X, "kernel": KERNEL, "bias": jnp.arange(4.0)},
    "Linear": (
        lambda: {"in_features": 3, "out_features": 4, "use_bias": True, "dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)},
        lambda: {"inputs": X},
    ),
}
