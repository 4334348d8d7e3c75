"""Good calls of what changes whole models, for `tests/test_bad_input.py`."""

import jax.numpy as jnp
from flax import nnx

CALLS = {
    "rewrite": lambda: {"fn": jnp.sin},
    "swap": lambda: {"model": nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "fp8": False},
}
