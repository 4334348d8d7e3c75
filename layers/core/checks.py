"""What layers of several families ask of their arguments."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def check_floating(name: str, **arrays: Any) -> None:
    """Raises TypeError unless each of the arrays, but for those that are None, is of a real floating-point dtype."""
    for key, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: {key} is of dtype {x.dtype}, but must be of a real floating-point dtype: cast it, {key}.astype('float32')")


def check_block_size(name: str, size: int | None) -> None:
    """Raises ValueError unless it is None or at least 1."""
    if size is not None and size < 1:
        raise ValueError(f"{name}: block_size is {size}, but a block has at least one row: None chooses")
