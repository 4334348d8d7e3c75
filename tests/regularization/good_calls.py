"""Good calls of dropout, for `tests/test_bad_input.py`."""

import jax
from flax import nnx

from tests.support import draw_normal

X, KEY = draw_normal(0, (2, 3, 4)), jax.random.key(1)

CALLS = {
    "dropout": lambda: {"x": X, "key": KEY, "rate": 0.4, "broadcast_dims": (1,), "generator": "hash"},
    "Dropout": (
        lambda: {"rate": 0.4, "broadcast_dims": (1,), "deterministic": False, "rngs": nnx.Rngs(0), "generator": "threefry"},
        lambda: {"inputs": X, "deterministic": False, "rngs": KEY},
    ),
}
