"""Good calls of `surgery`, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp

from tests.support import draw_normal

X = draw_normal(0, (3, 4))


CALLS = {
    "add_gradient_noise": lambda: {"x": X, "key": jax.random.key(1), "stddev": 0.1},
    "clip_gradient": lambda: {"x": X, "max_value": 0.5, "max_norm": 1.0},
    "replace_gradient": lambda: {"forward_fn": jnp.sign, "backward_fn": jnp.tanh},
    "reverse_gradient": lambda: {"x": X, "scale": 0.5},
    "scale_gradient": lambda: {"x": X, "scale": 0.5},
    "straight_through": lambda: {"fn": jnp.round},
}
