"""Good calls of `embed`, for `tests/test_bad_input.py`."""

import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal

INDICES = jnp.array([[0, 3, 3], [4, 0, 1]])

CALLS = {
    "embed": lambda: {"indices": INDICES, "embedding": draw_normal(0, (7, 5))},
    "Embed": (lambda: {"num_embeddings": 7, "features": 5, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}, lambda: {"inputs": INDICES}),
}
