"""Good calls of `linear`, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp

X, KERNEL = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (3, 4))

CALLS = {"linear": lambda: {"x": X, "kernel": KERNEL, "bias": jnp.arange(4.0)}}
