"""Good calls of what functions with rules of their own and programs for other machines are made with, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp


def _with_rules():
    fn = jax.custom_vjp(jnp.sin)
    fn.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    return fn


CALLS = {
    "compiling_for": lambda: {"platform": "cuda"},
    "custom_vjp": lambda: {"fun": jnp.sin},
    "engine": lambda: {"name": "linear"},
    "once_differentiable": lambda: {"backward": lambda ctx, g: g},
    "from_custom_vjp": lambda: {"fn": _with_rules()},
}
