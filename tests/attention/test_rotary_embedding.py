"""Rotation of features by position, against complex multiplication."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from layers import rotary_embedding
from tests.support import assert_trees_close, saved_bytes

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
        x = jax.random.normal(jax.random.key(0), (2, 3, 2, 6), jnp.float64)
        ours, pull = jax.vjp(lambda x: rotary_embedding(x, positions, base=50.0, rotated_features=rotated, interleaved=interleaved), x)
        expected, expected_pull = jax.vjp(lambda x: by_complex_numbers(x, positions, 50.0, rotated, interleaved), x)
        assert_trees_close((ours, pull(jnp.cos(x))), (expected, expected_pull(jnp.cos(x))), rtol=0, atol=1e-10)


def test_only_positions_are_saved() -> None:
    x, positions = jnp.ones((2, 64, 4, 16)), jnp.arange(64)
    assert saved_bytes(lambda x: rotary_embedding(x, positions), x) + x.nbytes <= positions.nbytes


@pytest.mark.parametrize(
    "error, words, args, options",
    [
        (TypeError, "dtype", (jnp.ones((2, 1, 4), int),), {}),
        (ValueError, "shape", (jnp.ones((2, 4)),), {}),
        (ValueError, "even", (jnp.ones((2, 1, 4)),), {"rotated_features": 3}),
        (ValueError, "even", (jnp.ones((2, 1, 4)),), {"rotated_features": 6}),
        (ValueError, "positions", (jnp.ones((2, 1, 4)), jnp.arange(3)), {}),
    ],
)
def test_wrong_input_is_refused(error: type[Exception], words: str, args: Any, options: Any) -> None:
    with pytest.raises(error, match=f"rotary_embedding: .*{words}"):
        rotary_embedding(*args, **options)
