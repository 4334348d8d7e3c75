"""What the perceptrons ask of their arguments, and the shapes they come in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.core.checks import check_block_size, check_floating
from layers.core.elementwise import ACTIVATIONS

SAVE = ("inputs", "preactivations")


def check_options(name: str, activation: str, save: str, size: int | None, dtype: Any) -> None:
    """Raises unless each is one that there is."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}, but must be one of {', '.join(ACTIVATIONS)}")
    if save not in SAVE:
        raise ValueError(f"{name}: save is {save!r}, but must be one of {', '.join(SAVE)}")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: dtype is {jnp.dtype(dtype)}, but must be a real floating-point dtype")
    check_block_size(name, size)


def check_arrays(name: str, x: jax.Array, ups: dict[str, jax.Array], down_kernel: jax.Array, **biases: jax.Array | None) -> None:
    """Raises unless all arrays are real and floating and their shapes fit: `ups` are (in_features, hidden), by name."""
    check_floating(name, x=x, **ups, down_kernel=down_kernel, **biases)
    if x.ndim == 0:
        raise ValueError(f"{name}: x is a scalar, but needs a last axis of features")
    if down_kernel.ndim != 2:
        raise ValueError(f"{name}: down_kernel has shape {down_kernel.shape}, but must be (hidden_features, out_features)")
    hidden, out = down_kernel.shape
    for key, kernel in ups.items():
        if kernel.shape != (x.shape[-1], hidden):
            hint = ": transpose it, " + f"{key}.T" if kernel.shape == (hidden, x.shape[-1]) else ""
            raise ValueError(
                f"{name}: {key} has shape {kernel.shape}, but must be (in_features, hidden_features) = {(x.shape[-1], hidden)} "
                f"(x: {x.shape}, down_kernel: {down_kernel.shape}){hint}"
            )
    for key, bias in biases.items():
        size = out if key == "down_bias" else hidden
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name}: {key} has shape {bias.shape}, but must be {(size,)} (down_kernel: {down_kernel.shape})")


def check_norm(name: str, x: jax.Array, scale: jax.Array | None, epsilon: float) -> None:
    """Raises unless the scale of the norm, where there is one, is real and floating and fits x, and epsilon is not negative."""
    check_floating(name, norm_scale=scale)
    if scale is not None and scale.shape != x.shape[-1:]:
        raise ValueError(f"{name}: norm_scale has shape {scale.shape}, but the last axis of x is {x.shape[-1:]} (x: {x.shape})")
    if epsilon < 0:
        raise ValueError(f"{name}: epsilon is {epsilon}, but must not be negative")


def as_arrays(*arrays: Any) -> list[Any]:
    """JAX arrays of all that is not None."""
    return [None if a is None else jnp.asarray(a) for a in arrays]
