"""Rotary position embedding: each pair of features is rotated by an angle in proportion to its position.

    angle_i = position f_i,   y_a = m (x_a cos - x_b sin),   y_b = m (x_b cos + x_a sin)

for the pairs (a, b) = (i, i + rotated / 2), or (2 i, 2 i + 1) where interleaved; f_i = base^(-2 i / rotated), or as `frequencies.py` scales it; m is
1 but for YaRN. A rotation's transpose is the rotation back:

    dx = y with dy for x and -angle for angle

Pairs that do not turn are not touched. Saved: the positions, and frequencies that are an argument. Cosines and sines, one table for all heads, are
computed again; where XLA finds that it has them already, it may keep them.

Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; several coordinates: Wang et al., "Qwen2-VL", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layers.attention.frequencies import WHO, scaled_frequencies
from layers.core import checks
from layers.core.numerics import wide
from layers.function.function import Function


@dataclass(frozen=True)
class Rotation:
    """What is known when the program is traced.

    Attributes:
        rotated: the features, the first ones, of which pairs are made.
        frequencies: of each pair that turns, the first ones; None where they are an array.
        interleaved, sections, heads_first: as in `rotary_embedding`.
        factor: m.
    """

    rotated: int
    frequencies: tuple[float, ...] | None
    interleaved: bool = False
    sections: tuple[int, ...] | None = None
    heads_first: bool = False
    factor: float = 1.0


class RotaryEmbeddingFunction(Function):
    @staticmethod
    def forward(ctx, x, positions, frequencies, rotation):
        ctx.save_for_backward(positions, frequencies)
        ctx.rotation = rotation
        return _rotate(x, positions, frequencies, rotation, 1)

    @staticmethod
    def backward(ctx, dy):
        positions, frequencies = ctx.saved_tensors
        return _rotate(dy, positions, frequencies, ctx.rotation, -1), None, None, None

    @staticmethod
    def example(key, dtype):
        rotation = Rotation(4, (1.0, 0.1), factor=1.5)
        return jax.random.normal(key, (2, 3, 2, 6), dtype), jnp.array([[0, 1, 5], [3, 0, 2]]), None, rotation

    @staticmethod
    def examples(key, dtype):
        x, positions, _, rotation = RotaryEmbeddingFunction.example(key, dtype)
        sections = replace(rotation, rotated=6, frequencies=(1.0, 0.5, 0.1), sections=(1, 2))
        return {
            "pairs beside each other": (x, positions, None, replace(rotation, interleaved=True, factor=1.0)),
            "frequencies that are an array": (x, positions, jnp.array([2, 1]), replace(rotation, frequencies=None)),
            "heads before time": (x.swapaxes(1, 2), positions, None, replace(rotation, heads_first=True)),
            "positions of several axes": (x, jnp.stack([positions, positions[::-1]], -1), None, sections),
            "far positions": (x, 10000 * positions, None, rotation),
            "no tokens": (x[:, :0], positions[:, :0], None, rotation),
        }


def _rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array | None, rotation: Rotation, sign: int) -> jax.Array:
    dtype, half = wide(x.dtype), rotation.rotated // 2
    frequencies = jnp.asarray(rotation.frequencies if frequencies is None else frequencies, dtype)
    turning = frequencies.shape[0]
    angle = _angles(positions.astype(dtype), frequencies, rotation)
    angle = jnp.expand_dims(angle, -3 if rotation.heads_first else -2)
    cos, sin = jnp.cos(angle) * rotation.factor, jnp.sin(angle) * (sign * rotation.factor)
    if rotation.interleaved:
        pairs = x[..., : 2 * turning].reshape(*x.shape[:-1], turning, 2).astype(dtype)
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        a, b = x[..., :turning].astype(dtype), x[..., half : half + turning].astype(dtype)
    a, b = (a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)
    if rotation.interleaved:
        return jnp.concatenate([jnp.stack([a, b], -1).reshape(*x.shape[:-1], 2 * turning), x[..., 2 * turning :]], -1)
    return jnp.concatenate([a, x[..., turning:half], b, x[..., half + turning :]], -1)


def _angles(positions: jax.Array, frequencies: jax.Array, rotation: Rotation) -> jax.Array:
    """(*batch, time, pairs that turn)."""
    if rotation.sections is None:
        return positions[..., None] * frequencies
    coordinate = np.repeat(np.arange(len(rotation.sections)), rotation.sections)[: frequencies.shape[0]]
    return positions[..., coordinate] * frequencies


def rotary_embedding(
    x: Float[Array, "*batch time heads head_dim"],
    positions: Int[Array, "*#batch time"] | None = None,
    *,
    base: float = 10_000.0,
    rotated_features: int | None = None,
    interleaved: bool = False,
    frequencies: Float[Array, " pairs"] | None = None,
    scaling: dict[str, Any] | None = None,
    sections: tuple[int, ...] | None = None,
    heads_first: bool = False,
) -> Float[Array, "*batch time heads head_dim"]:
    """Rotates pairs of features by an angle in proportion to the position (RoPE), so that products of queries and keys see how far apart they are.

    Args:
        x: queries or keys.
        positions: of each step of time, for all batch elements or for each; None for 0, 1, ...; no gradient goes to them.
        base: the longest period is 2 π base.
        rotated_features: how many features are rotated, the first ones; None for all.
        interleaved: whether pairs are neighbours, (0, 1), (2, 3), ...; else each half of the features is one side.
        frequencies: by how much each of the rotated_features / 2 pairs turns at a step, in place of `base`; a constant.
        scaling: for long contexts, the `rope_scaling` of a configuration of Hugging Face's transformers: a dictionary with "rope_type", one of
            "default", "linear", "llama3", "yarn" and "proportional" (of "partial_rotary_factor" of the pairs, which turn as if all did), and
            the numbers of that type.
        sections: for positions of several coordinates, the last axis of `positions`: how many pairs turn with each, one after the other. Each
            section has frequencies of its own, from 1 down, unless `frequencies` gives all: (n, n) for a picture of rows and columns.
        heads_first: whether `x` is (*batch, heads, time, head_dim).

    Returns:
        An array of the shape and dtype of `x`; angles are of float32 or wider.

    Raises:
        ValueError: where `positions` or `frequencies` do not fit `x`, or the number of rotated features is odd or too large, or a number is out of
            its range.
        TypeError: where arrays are of the wrong dtype.
    """
    x, heads_first = checks.array(WHO, "x", x), checks.flag(WHO, "heads_first", heads_first)
    if x.ndim < 3:
        axes = "heads, time" if heads_first else "time, heads"
        raise ValueError(f"{WHO}: x has shape {x.shape}, but must be (*batch, {axes}, head_dim)")
    rotated = checks.integer(WHO, "rotated_features", rotated_features, "[0, inf)", optional=True)
    rotated = x.shape[-1] if rotated is None else rotated
    if rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(f"{WHO}: rotated_features is {rotated}, but must be an even number up to {x.shape[-1]} (x: {x.shape})")
    sections = _sections(sections, rotated // 2)
    base, interleaved = checks.number(WHO, "base", base, "(0, inf)"), checks.flag(WHO, "interleaved", interleaved)
    if frequencies is not None and scaling is not None:
        raise ValueError(f"{WHO}: give frequencies or scaling, not both: scaling computes them from base")
    static, factor = None, 1.0
    if frequencies is None:
        parts = [scaled_frequencies(n, base, scaling) for n in sections or (rotated // 2,)]
        static, factor = tuple(np.trim_zeros(np.concatenate([f for f, _ in parts]), "b").tolist()), parts[0][1]
    else:
        frequencies = jax.lax.stop_gradient(checks.array(WHO, "frequencies", frequencies, "real"))
        checks.shape(WHO, "frequencies", frequencies, (rotated // 2,), "(rotated_features / 2,)", x=x)
    positions = _positions(positions, x, sections, heads_first)
    if not rotated:
        return x
    return RotaryEmbeddingFunction.apply(x, positions, frequencies, Rotation(rotated, static, interleaved, sections, heads_first, factor))


def _sections(sections: Any, pairs: int) -> tuple[int, ...] | None:
    if sections is None:
        return None
    if not isinstance(sections, (tuple, list)) or not sections:
        raise TypeError(
            f"{WHO}: sections is {checks.shown(sections)}, but must be a tuple of whole numbers, such as ({pairs // 2}, {pairs - pairs // 2})"
        )
    found = tuple(checks.integer(WHO, "sections", n, "[0, inf)") for n in sections)
    if sum(found) != pairs:
        raise ValueError(f"{WHO}: sections is {found}, but must add up to {pairs}, half of the rotated features")
    return found


def _positions(positions: Any, x: jax.Array, sections: tuple[int, ...] | None, heads_first: bool) -> jax.Array:
    steps = (*x.shape[:-3], x.shape[-2]) if heads_first else x.shape[:-2]
    steps, axes = (steps, "(*batch, time)") if sections is None else ((*steps, len(sections)), "(*batch, time, coordinates)")
    if positions is None:
        if sections is not None:
            raise ValueError(f"{WHO}: positions is None, but with sections must be {axes} = {steps}")
        return jnp.arange(steps[-1], dtype=jnp.int32)
    positions = jax.lax.stop_gradient(checks.array(WHO, "positions", positions, "real"))
    full, last = (1,) * (len(steps) - positions.ndim) + positions.shape, 1 if sections is None else 2
    if len(full) != len(steps) or full[-last:] != steps[-last:] or any(n not in (1, m) for n, m in zip(full, steps, strict=True)):
        raise ValueError(f"{WHO}: positions have shape {positions.shape}, but must fit {axes} = {steps} of x {x.shape}")
    return positions
