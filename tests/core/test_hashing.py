"""The hash that masks are drawn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core.hashing import hash_bits, mix, spared

MASK = 2**32 - 1


def undo(y: int) -> int:
    """The inverse of `mix`, in whole numbers."""

    def unshift(x: int, by: int) -> int:
        y = x
        for _ in range(3):
            y = x ^ (y >> by)
        return y

    x = unshift(y, 15) * pow(0xD35A2D97, -1, 2**32) & MASK
    x = unshift(x, 15) * pow(0x21F0AAAD, -1, 2**32) & MASK
    return unshift(x, 16)


def test_mix_can_be_undone() -> None:
    words = [0, 1, 2, 12345, 2**31, MASK]
    assert [undo(int(y)) for y in mix(jnp.array(words, jnp.uint32))] == words


def test_flipped_bit_flips_every_bit_half_of_the_time() -> None:
    n = 1 << 15
    x = jnp.arange(n, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for bit in range(32):
        changed = np.asarray(mix(x) ^ mix(x ^ jnp.uint32(1 << bit)))
        share = ((changed[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(0)
        assert np.abs(share - 0.5).max() < 0.02


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_of_the_hashes_of_a_counter_are_uniform(shift: int) -> None:
    n = 1 << 18
    counts = np.bincount((np.asarray(mix(jnp.arange(n, dtype=jnp.uint32))) >> shift) & 255, minlength=256)
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 4.5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("rate", [0, 2.0**-40, 1e-4, 0.1, 0.5, 0.999, 1])
def test_share_that_is_not_spared_is_the_rate(rate: float, traced: bool) -> None:
    n = 1 << 18
    draw = lambda rate: spared(mix(jnp.arange(n, dtype=jnp.uint32)), rate)
    share = 1 - float(np.asarray(jax.jit(draw)(rate) if traced else draw(rate)).mean())
    assert abs(share - rate) <= 4.5 * np.sqrt(rate * (1 - rate) / n) + 1e-9


def test_bits_of_some_rows_are_those_of_all_rows_there() -> None:
    words, rows = jnp.array([3, 7], jnp.uint32), jnp.array([4, 0, 2])
    np.testing.assert_array_equal(hash_bits(words, (5, 3, 2), rows), hash_bits(words, (5, 3, 2))[rows])
