"""Good calls of `reversible`, for `tests/test_bad_input.py`."""

import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal

X1, X2, X = (draw_normal(i, shape) for i, shape in enumerate([(3, 4), (3, 4), (3, 6)]))


def pair(rngs):
    return nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)


CALLS = {
    "reversible_coupling": [
        lambda: {"f": jnp.sin, "g": jnp.cos, "x1": X1, "x2": X2, "exact": True, "headroom": 256.0},
        lambda: {"f": jnp.sin, "g": jnp.cos, "x1": X1, "x2": X2, "stream_dtype": jnp.float32, "exact": False},
    ],
    "ReversibleStack": (
        lambda: {"blocks": pair, "depth": 2, "scan": True, "axis": -1, "exact": False, "headroom": 256.0, "rngs": nnx.Rngs(0)},
        lambda: {"x": X},
    ),
}
