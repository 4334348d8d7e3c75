"""Pairs of steps j < i of a chunk, by halves: what attention with decay is made of.

A block of 2 m steps is two of m, and every pair with i in the second half and j in the first decays from j to i by

    exp(Σ_{j<t≤i} g_t) = exp(up_i) exp(down_j),   up_i = Σ g_t from the second half's start to i,   down_j = Σ g_t from j + 1 to the first one's end

so that what such pairs add up to is a product of matrices. The blocks of 1, 2, 4, ... steps have every pair once. All exponents are sums of some
g_t, never differences of sums, so none is positive where g is not, and a g of -50 or -inf beside small ones costs no digits and no derivative.

Where sequences are packed, i and j meet only in the sequence that goes across the border between their halves: rows of all others are left out of
that product, and of what it adds to, so that NaN in one does not reach another.

Reference: Blelloch, "Prefix Sums and Their Applications", 1990: the halving is that of the parallel prefix sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.machine import on_accelerator
from layers.core.products import einsum
from layers.recurrent.gates import visible


class Level(NamedTuple):
    """The pairs of the halves of all blocks of 2 `half` steps.

    Attributes:
        half: steps in a half.
        up: of the steps of second halves, (..., blocks, half, features).
        down: of those of first halves.
        second: which steps of second halves are of the sequence that goes across the border, (..., blocks, half, 1); None where all are.
        first: the same of first halves.
    """

    half: int
    up: jax.Array
    down: jax.Array
    second: Any
    first: Any

    def later(self, x: jax.Array) -> jax.Array:
        """The second halves of the blocks of `x`, zeros where a step is of another sequence."""
        return visible(_halves(x, self.half)[1], self.second)

    def earlier(self, x: jax.Array) -> jax.Array:
        """The first halves, the same."""
        return visible(_halves(x, self.half)[0], self.first)


class Decays(NamedTuple):
    """How the steps of chunks decay, and which steps see which.

    Attributes:
        levels: those of the pairs within a chunk, from halves of one step on.
        up: Σ g_t from a chunk's start to each step, (..., time, features).
        down: Σ g_t from the step after to the chunk's end.
        since: which steps are of the sequence before their chunk, (..., time, 1); None where all are.
        until: which are of the last one of their chunk.
    """

    levels: list[Level]
    up: jax.Array
    down: jax.Array
    since: Any
    until: Any


class Runs(NamedTuple):
    """Packed sequences in some successive chunks, by their numbers.

    Attributes:
        before: that of the step before each chunk, (batch, 1, chunks).
        steps: that of each step, (batch, 1, time).
    """

    before: jax.Array
    steps: jax.Array

    @staticmethod
    def at(runs: Any, start: Any, size: int, chunk: int) -> Runs | None:
        """Of `size` steps from `start` on and the padding of the last chunk, of the numbers `runs`, (batch, time); None where all is one sequence."""
        if runs is None:
            return None
        steps = padded(lax.dynamic_slice_in_dim(runs, start, size, 1)[:, None, :, None], chunk, mode="edge")[..., 0]
        first = lax.dynamic_slice_in_dim(runs, jnp.maximum(start - 1, 0), 1, 1)[:, None]
        return Runs(jnp.concatenate([first, steps[..., chunk - 1 : -1 : chunk]], 2), steps)


def padded(x: jax.Array, chunk: int, mode: str = "constant") -> jax.Array:
    """(batch, heads, time, features) with steps added at the end, so that there are whole chunks."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0)), mode)


def decays(g: jax.Array, runs: Runs | None, chunk: int) -> Decays:
    """Of `g`, (batch, heads, time, features), where the time is some chunks, each of `chunk` steps, a power of 2."""
    steps = None if runs is None else runs.steps[..., None]
    levels, up, down, half = [], g, jnp.zeros_like(g), 1
    while half < chunk:
        (up1, up2), (down1, down2) = _halves(up, half), _halves(down, half)
        second, first = (None, None) if steps is None else _meeting(steps, half)
        levels.append(Level(half, visible(up2, second), visible(down1, first), second, first))
        up, down = _whole(up1, up2 + up1[..., -1:, :]), _whole(down1 + up2[..., -1:, :], down2)
        half *= 2
    if runs is None:
        return Decays(levels, up, down, None, None)
    chunks = runs.steps.reshape(*runs.steps.shape[:2], runs.steps.shape[2] // chunk, chunk)
    since, until = chunks == runs.before[..., None], chunks == chunks[..., -1:]
    return Decays(levels, up, down, *(x.reshape(runs.steps.shape)[..., None] for x in (since, until)))


def _meeting(steps: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    first, second = _halves(steps, half)
    return second == first[..., -1:, :], first == first[..., -1:, :]


def pair_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """x_iᵀ y_j for the steps of two halves, (..., half, half)."""
    if _is_small(x):
        return (x[..., :, None, :] * y[..., None, :, :]).sum(-1)
    return einsum("bhnik,bhnjk->bhnij", x, y)


def weighted_sums(weights: jax.Array, v: jax.Array, spec: str = "bhnij,bhnjv->bhniv") -> jax.Array:
    """Σ_j weights_ij v_j, (..., half, values), as `spec` says; where `v` has more axes than `weights`, they are its third and following."""
    if _is_small(v):
        weights = weights.reshape(*weights.shape[:2], *(1 for _ in range(v.ndim - weights.ndim)), *weights.shape[2:])
        return (weights[..., None] * v[..., None, :, :]).sum(-2)
    return einsum(spec, weights, v)


def _is_small(x: jax.Array) -> bool:
    """Whether a product of halves is better a sum: an accelerator starts its unit for matrices for products of at least 16 rows."""
    return on_accelerator() and x.shape[-2] < 16


def add_shares(out: jax.Array, shares: list[jax.Array]) -> jax.Array:
    """`out` with the shares of all levels added to the second halves; what decays most is the least, and is added first: the largest blocks'."""
    for share in reversed(shares):
        first, second = _halves(out, share.shape[-2])
        out = _whole(first, second + share)
    return out


def by_chunk(x: Any, chunk: int) -> Any:
    """(batch, heads, time, features) as (batch, heads, chunks, chunk, features); None stays None."""
    return None if x is None else x.reshape(*x.shape[:2], x.shape[2] // chunk, chunk, x.shape[3])


def faded(x: jax.Array, power: jax.Array, keep: Any) -> jax.Array:
    """x exp(power), and 0 where it is not to be kept."""
    return visible(x, keep) * jnp.exp(visible(power, keep))


def _halves(x: jax.Array, half: int) -> jax.Array:
    """(..., time, features) as the first and the second halves of its blocks of 2 `half` steps, (2, ..., blocks, half, features)."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], x.shape[-2] // (2 * half), 2, half, x.shape[-1]), -3, 0)


def _whole(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `_halves`."""
    return jnp.stack([first, second], -3).reshape(*first.shape[:-3], 2 * first.shape[-3] * first.shape[-2], first.shape[-1])
