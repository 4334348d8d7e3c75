"""The codebook of finite scalar quantisation, which is a grid: from the index of a code to the code, and back.

    digit of channel c = (index // Π_{j<c} L_j) mod L_c,   code of the channel = digit / (L_c // 2) - 1

Reference: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layers.core import checks


def finite_scalar_codes(indices: Int[Array, "*batch"], levels: Sequence[int], *, dtype: Any = jnp.float32) -> Float[Array, "*batch channels"]:
    """Gives the code of each index, the quantised vector that `finite_scalar_quantize` returns with it.

    Args:
        indices: in [0, the product of `levels`); others wrap around.
        levels: as for `finite_scalar_quantize`.
        dtype: of the codes.

    Raises:
        ValueError: where `levels` has an entry below 2, or more codes than an int32 counts. TypeError: where `indices` are not integers.

    Reference: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023.
    """
    indices = checks.array("finite_scalar_codes", "indices", indices, "integer").astype(jnp.int32)
    counts = np.asarray(check_levels("finite_scalar_codes", levels), np.int32)
    digits = indices[..., None] // _places(counts) % counts
    return ((digits - counts // 2) / (counts // 2)).astype(checks.dtype("finite_scalar_codes", "dtype", dtype, optional=False))


def finite_scalar_indices(codes: Float[Array, "*batch channels"], levels: Sequence[int]) -> Int[Array, "*batch"]:
    """Gives the index of each code, int32, the first channel fastest; what lies between levels goes to the nearest.

    Args:
        codes: quantised vectors, as `finite_scalar_quantize` and `finite_scalar_codes` return them.
        levels: as for these, one for each channel.

    Raises:
        ValueError: where `levels` does not fit `codes`, has an entry below 2, or more codes than an int32 counts. TypeError: where `codes` is
            not of a floating-point dtype.

    Reference: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023.
    """
    codes = checks.array("finite_scalar_indices", "codes", codes)
    return index_of(codes, check_levels("finite_scalar_indices", levels, codes, "codes"))


def index_of(codes: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The index of the code nearest to each vector; NaN counts as the lowest level."""
    counts = np.asarray(levels, np.int32)
    digits = jnp.round(codes.astype(jnp.float32) * (counts // 2) + counts // 2)
    digits = jnp.where(digits > 0, jnp.minimum(digits, counts - 1), 0).astype(jnp.int32)
    return jnp.sum(digits * _places(counts), axis=-1, dtype=jnp.int32)


def check_levels(who: str, levels: Any, x: jax.Array | None = None, what: str = "x") -> tuple[int, ...]:
    """The levels as a tuple of whole numbers, one for each entry of the last axis of `x`, where that is given."""
    if not isinstance(levels, (tuple, list, np.ndarray)):
        raise TypeError(f"{who}: levels is {checks.shown(levels)}, but must be a sequence of whole numbers, one for each channel")
    found = tuple(checks.integer(who, f"levels[{i}]", n, "[2, inf)") for i, n in enumerate(levels))
    if x is not None and (x.ndim < 1 or x.shape[-1] != len(found)):
        raise ValueError(f"{who}: levels has {len(found)} entries, but {what} has shape {x.shape}; give one for each channel")
    if int(np.prod(found, dtype=object)) > 2**31 - 1:
        raise ValueError(f"{who}: levels is {found}, but their product must be below 2**31")
    return found


def _places(counts: np.ndarray) -> np.ndarray:
    """What a digit of each channel counts for."""
    return np.cumprod((1, *counts[:-1])).astype(np.int32)
