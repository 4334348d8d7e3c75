"""Rotation of features by position, against complex multiplication."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import rotary_embedding
from tests.support import assert_trees_close, draw_normal, saved_bytes

POSITIONS = [None, jnp.array([4, 0, 7]), jnp.array([[0, 1, 5], [3, 0, 2]])]


def by_complex_numbers(x: Any, positions: Any, base: float, rotated: int, interleaved: bool) -> Any:
    positions = jnp.arange(x.shape[-3]) if positions is None else positions
    turn = jnp.exp(1j * positions[..., None, None] / base ** (jnp.arange(rotated // 2) * 2 / rotated))
    y, half = x[..., :rotated], rotated // 2
    z = (y[..., ::2] + 1j * y[..., 1::2] if interleaved else y[..., :half] + 1j * y[..., half:]) * turn
    y = jnp.stack([z.real, z.imag], -1).reshape(y.shape) if interleaved else jnp.concatenate([z.real, z.imag], -1)
    return jnp.concatenate([y, x[..., rotated:]], -1)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rotated, interleaved", [(6, False), (6, True), (4, False), (2, True)])
def test_values_and_gradients_are_those_of_complex_multiplication(positions: Any, rotated: int, interleaved: bool) -> None:
    with jax.enable_x64(True):
        x = draw_normal(0, (2, 3, 2, 6), jnp.float64)
        ours, pull = jax.vjp(lambda x: rotary_embedding(x, positions, base=50.0, rotated_features=rotated, interleaved=interleaved), x)
        expected, expected_pull = jax.vjp(lambda x: by_complex_numbers(x, positions, 50.0, rotated, interleaved), x)
        assert_trees_close((ours, pull(jnp.cos(x))), (expected, expected_pull(jnp.cos(x))), rtol=0, atol=1e-10)


def test_only_positions_are_saved() -> None:
    x, positions = jnp.ones((2, 64, 4, 16)), jnp.arange(64)
    assert saved_bytes(lambda x: rotary_embedding(x, positions), x) + x.nbytes <= positions.nbytes


def by_frequencies(x: Any, positions: Any, frequencies: Any, factor: float = 1.0) -> Any:
    """Of (batch, time, heads, head_dim), in halves, each pair by its own frequency."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * factor * np.exp(1j * np.asarray(positions, float)[..., None, None] * frequencies)
    return jnp.concatenate([z.real, z.imag], -1)


def llama3(f: float, factor: float, low: float, high: float, length: float) -> float:
    """As in `modeling_rope_utils.py` of transformers."""
    wavelength = 2 * math.pi / f
    if wavelength < length / high:
        return f
    if wavelength > length / low:
        return f / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def yarn(i: int, dim: int, base: float, factor: float, length: float, fast: float = 32, slow: float = 1) -> float:
    """The same for YaRN."""
    low, high = (dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    extrapolated, interpolated = 1 / base ** (2 * i / dim), 1 / (factor * base ** (2 * i / dim))
    extrapolation = 1 - min(max((i - low) / (high - low), 0), 1)
    return interpolated * (1 - extrapolation) + extrapolated * extrapolation


DIM, BASE, LENGTH = 32, 500.0, 256
PLAIN = [BASE ** (-2 * i / DIM) for i in range(DIM // 2)]
SCALINGS: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "default": ({"rope_type": "default"}, PLAIN, 1.0),
    "linear": ({"type": "linear", "factor": 4}, [f / 4 for f in PLAIN], 1.0),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH},
        [llama3(f, 8.0, 1.0, 4.0, LENGTH) for f in PLAIN],
        1.0,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH},
        [yarn(i, DIM, BASE, 4.0, LENGTH) for i in range(DIM // 2)],
        0.1 * math.log(4.0) + 1,
    ),
    "yarn, its numbers": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH, "beta_fast": 20, "beta_slow": 2, "attention_factor": 1.5},
        [yarn(i, DIM, BASE, 4.0, LENGTH, 20, 2) for i in range(DIM // 2)],
        1.5,
    ),
    "yarn of DeepSeek": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH, "mscale": 0.7, "mscale_all_dim": 2.0},
        [yarn(i, DIM, BASE, 4.0, LENGTH) for i in range(DIM // 2)],
        (0.07 * math.log(4.0) + 1) / (0.2 * math.log(4.0) + 1),
    ),
    "proportional": ({"rope_type": "proportional", "partial_rotary_factor": 0.25}, [f if i < 4 else 0.0 for i, f in enumerate(PLAIN)], 1.0),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name: str) -> None:
    scaling, frequencies, factor = SCALINGS[name]
    with jax.enable_x64(True):
        x, positions = draw_normal(0, (2, 3, 2, DIM), jnp.float64), jnp.array([0, 17, 300])
        ours, pull = jax.vjp(lambda x: rotary_embedding(x, positions, base=BASE, scaling=scaling), x)
        expected, expected_pull = jax.vjp(lambda x: by_frequencies(x, positions, frequencies, factor), x)
        assert_trees_close((ours, pull(jnp.cos(x))), (expected, expected_pull(jnp.cos(x))), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama3", "proportional"])
def test_frequencies_of_ones_own_are_those_that_scaling_computes(name: str) -> None:
    scaling, frequencies, _ = SCALINGS[name]
    with jax.enable_x64(True):
        x = draw_normal(0, (2, 3, 2, DIM), jnp.float64)
        given = jax.jit(lambda f: rotary_embedding(x, frequencies=f))(jnp.array(frequencies))
        assert_trees_close(given, rotary_embedding(x, base=BASE, scaling=scaling), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_that_do_not_turn_are_not_touched(interleaved: bool) -> None:
    x = draw_normal(0, (1, 3, 2, DIM))
    scaling = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    still = jnp.arange(DIM) >= 8 if interleaved else jnp.arange(DIM) % (DIM // 2) >= 4
    run = lambda x: rotary_embedding(x, scaling=scaling, interleaved=interleaved)
    given = run(jnp.where(still, jnp.nan, x))
    assert bool((jnp.isnan(given) == still).all())
    assert_trees_close(given[..., ~still], run(x)[..., ~still], rtol=0)
    assert_trees_close(run(x)[..., still], x[..., still], rtol=0)


@pytest.mark.parametrize("options", [{}, {"interleaved": True, "rotated_features": 4}, {"sections": (2, 1)}])
def test_heads_may_come_first(options: dict[str, Any]) -> None:
    x = draw_normal(0, (2, 3, 4, 6))
    positions = jnp.array([[0, 1, 5], [3, 0, 2]])
    positions = jnp.stack([positions, positions[::-1]], -1) if "sections" in options else positions
    ours = rotary_embedding(jnp.swapaxes(x, 1, 2), positions, heads_first=True, **options)
    assert_trees_close(jnp.swapaxes(ours, 1, 2), rotary_embedding(x, positions, **options), rtol=1e-6, atol=1e-6)


def test_positions_of_two_coordinates_turn_a_section_each() -> None:
    with jax.enable_x64(True):
        x = draw_normal(0, (2, 6, 2, 12), jnp.float64)
        rows, columns = jnp.repeat(jnp.arange(2), 3), jnp.tile(jnp.arange(3), 2)
        ours = rotary_embedding(x, jnp.stack([rows, columns], -1), base=50.0, sections=(4, 2))
        of_rows, of_columns = 50.0 ** -(jnp.arange(4) / 4), 50.0 ** -(jnp.arange(2) / 2)
        angle = jnp.concatenate([rows[:, None] * of_rows, columns[:, None] * of_columns], -1)
        z = (x[..., :6] + 1j * x[..., 6:]) * jnp.exp(1j * angle)[:, None]
        assert_trees_close(ours, jnp.concatenate([z.real, z.imag], -1), rtol=0, atol=1e-12)


def test_sections_of_one_spectrum_are_those_of_qwen2_vl() -> None:
    """Its text: all coordinates equal, so that a section changes nothing."""
    with jax.enable_x64(True):
        x = draw_normal(0, (2, 5, 2, 12), jnp.float64)
        positions = jnp.broadcast_to(jnp.arange(5)[:, None], (5, 3))
        spectrum = 10_000.0 ** -(jnp.arange(6) / 6)
        assert_trees_close(rotary_embedding(x, positions, sections=(1, 2, 3), frequencies=spectrum), rotary_embedding(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "error, words, args, options",
    [
        (TypeError, "dtype", (jnp.ones((2, 1, 4), int),), {}),
        (ValueError, "shape", (jnp.ones((2, 4)),), {}),
        (ValueError, "heads, time", (jnp.ones((2, 4)),), {"heads_first": True}),
        (ValueError, "even", (jnp.ones((2, 1, 4)),), {"rotated_features": 3}),
        (ValueError, "even", (jnp.ones((2, 1, 4)),), {"rotated_features": 6}),
        (ValueError, "positions", (jnp.ones((2, 1, 4)), jnp.arange(3)), {}),
        (ValueError, "base is -1, but must be a number above 0", (jnp.ones((2, 1, 4)),), {"base": -1}),
        (ValueError, "base is nan", (jnp.ones((2, 1, 4)),), {"base": jnp.nan}),
        (ValueError, "not both", (jnp.ones((2, 1, 4)),), {"frequencies": jnp.ones(2), "scaling": {"rope_type": "default"}}),
        (ValueError, "frequencies has shape", (jnp.ones((2, 1, 4)),), {"frequencies": jnp.ones(4)}),
        (ValueError, "add up to 2", (jnp.ones((2, 1, 4)), jnp.ones((2, 2), int)), {"sections": (1, 2)}),
        (ValueError, "positions is None", (jnp.ones((2, 1, 4)),), {"sections": (1, 1)}),
        (ValueError, "positions have shape", (jnp.ones((2, 1, 4)), jnp.arange(2)), {"sections": (1, 1)}),
        (TypeError, "scaling is 'llama3', but must be a dictionary", (jnp.ones((2, 1, 4)),), {"scaling": "llama3"}),
        (ValueError, "rope_type", (jnp.ones((2, 1, 4)),), {"scaling": {"rope_type": "llama4"}}),
        (ValueError, "needs 'factor'", (jnp.ones((2, 1, 4)),), {"scaling": {"rope_type": "linear"}}),
        (ValueError, "scaling has 'beta'", (jnp.ones((2, 1, 4)),), {"scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}),
        (ValueError, "factor.* is 0", (jnp.ones((2, 1, 4)),), {"scaling": {"rope_type": "linear", "factor": 0}}),
    ],
)
def test_wrong_input_is_refused(error: type[Exception], words: str, args: Any, options: Any) -> None:
    with pytest.raises(error, match=f"rotary_embedding: .*{words}"):
        rotary_embedding(*args, **options)
