"""What layers of several families ask of their arguments."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def check_floating(name: str, **arrays: Any) -> None:
    """Raises TypeError unless each of the arrays, but for those that are None, is of a real floating-point dtype."""
    for key, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: {key} is of dtype {x.dtype}, but must be of a real floating-point dtype: cast it, {key}.astype('float32')")
