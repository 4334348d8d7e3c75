"""Good calls of `moe`, for `tests/test_bad_input.py`."""

import jax.numpy as jnp

from tests.support import draw_normal

X, KERNELS = (draw_normal(i, shape) for i, shape in enumerate([(9, 3), (4, 3, 2)]))

CALLS = {"grouped_matmul": lambda: {"x": X, "kernels": KERNELS, "group_sizes": jnp.array([3, 0, 4, 1]), "block_size": 2}}
