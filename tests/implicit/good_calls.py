"""Good calls of `implicit`, for `tests/test_bad_input.py`."""

import jax.numpy as jnp

START = jnp.array([0.3, -0.2, 0.5])


def options():
    return {"tol": 1e-4, "max_steps": 30, "backward_tol": 1e-3, "backward_steps": 20, "throw": False}


CALLS = {
    "argmin": lambda: {
        "f": lambda x: jnp.sum(x**2 - 0.3 * jnp.sin(x)),
        "x0": START,
        "solver": "newton",
        "backward": "cg",
        **options(),
    },
    "DEQ": (
        lambda: {"layer": lambda z, x: 0.3 * jnp.tanh(z) + x, "solver": "anderson", "backward": "gmres", **options()},
        lambda: {"x": START, "z0": START, "return_convergence": False},
    ),
    "fixed_point": lambda: {"f": jnp.cos, "x0": START, "solver": "anderson", "backward": "gmres", **options()},
    "root": lambda: {"f": lambda x: x + 0.3 * jnp.sin(x) - 0.2, "x0": START, "solver": "newton", "backward": "gmres", **options()},
}
