"""Good calls of audits, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp

X = jax.random.normal(jax.random.key(0), (2, 3))

CALLS = {
    "residuals": lambda: {"fn": jnp.tanh, "args": (X,)},
    "implementations": lambda: {"layer": "gelu", "args": (X,)},
    "advise": lambda: {"fn": jnp.tanh, "args": (X,)},
}
