"""What the activations ask of their arguments."""

from __future__ import annotations

from typing import Any

from layers.core.checks import check_floating


def check_real(name: str, **arrays: Any) -> None:
    """Raises unless all arrays are real and floating, and of one shape."""
    check_floating(name, **arrays)
    shapes = {key: x.shape for key, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        given = ", ".join(f"{key}: {shape}" for key, shape in shapes.items())
        raise ValueError(f"{name}: {' and '.join(shapes)} must have the same shape ({given}): broadcast one to the other")
