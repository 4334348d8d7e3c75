"""Good calls of audits, for `tests/test_bad_input.py`."""

import jax.numpy as jnp

from tests.support import draw_normal

X = draw_normal(0, (2, 3))

CALLS = {
    "residuals": lambda: {"fn": jnp.tanh, "args": (X,)},
    "implementations": lambda: {"layer": "gelu", "args": (X,)},
    "advise": lambda: {"fn": jnp.tanh, "args": (X,)},
}
