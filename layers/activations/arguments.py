"""What the activations ask of their arguments."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def check_real(name: str, **arrays: Any) -> None:
    """Raises unless all arrays are real and floating, and of one shape."""
    shapes = {key: x.shape for key, x in arrays.items()}
    for key, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: {key} is of dtype {x.dtype}, but must be of a real floating-point dtype: cast it, {key}.astype('float32')")
    if len(set(shapes.values())) > 1:
        given = ", ".join(f"{key}: {shape}" for key, shape in shapes.items())
        raise ValueError(f"{name}: {' and '.join(shapes)} must have the same shape ({given}): broadcast one to the other")
