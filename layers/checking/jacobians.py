"""The Jacobian of a function: by finite differences, from the backward rule, in forward mode; whole, or projected on random directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.checking.problem import Fn, Problem, as_arrays, as_vector, draw, real_size

DIRECTIONS = 8
"""Random directions for each input in fast mode."""


def by_differences(p: Problem, outputs: list[Any], eps: float, directions: Any) -> np.ndarray:
    """The Jacobian, a row for each entry of the outputs and a column for each of the inputs; or its projections."""

    def column(v: Any) -> Any:
        steps = as_arrays(eps * v, p.inputs)
        after = p.outputs(*[x + s for x, s in zip(p.inputs, steps, strict=True)])
        before = p.outputs(*[x - s for x, s in zip(p.inputs, steps, strict=True)])
        return (as_vector(after) - as_vector(before)) / (2 * eps)

    return _by_columns(p, column, outputs, directions)


def by_forward_mode(p: Problem, outputs: list[Any], directions: Any) -> np.ndarray:
    def column(v: Any) -> Any:
        return as_vector(jax.jvp(p.outputs, p.inputs, as_arrays(v, p.inputs))[1])

    return _by_columns(p, column, outputs, directions)


def _by_columns(p: Problem, column: Fn, outputs: list[Any], directions: Any) -> np.ndarray:
    if directions is None:
        return _for_each(column, np.eye(sum(map(real_size, p.inputs))), sum(map(real_size, outputs))).T
    left, right = directions
    return left @ _for_each(column, right, left.shape[1]).T


def _row(p: Problem, outputs: list[Any], pull: Fn) -> Fn:
    """The product of a vector and the Jacobian, from the backward rule."""
    return lambda v: as_vector([jnp.conj(g) for g in pull([c.conj() for c in as_arrays(v, outputs)])])


def by_backward(p: Problem, outputs: list[Any], pull: Fn, directions: Any, more: Any) -> tuple[np.ndarray, np.ndarray]:
    """The Jacobian from the backward rule, or its projections; and what the rule gives for more rows, in the same program."""
    row, width = _row(p, outputs, pull), sum(map(real_size, p.inputs))
    if directions is None:
        whole = sum(map(real_size, outputs))
        rows = _for_each(row, np.concatenate([np.eye(whole), more]), width)
        return rows[:whole], rows[whole:]
    left, right = directions
    return _for_each(row, left, width) @ right.T, np.zeros((0, width))


def draw_directions(p: Problem, outputs: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random projections: one row for each output, `DIRECTIONS` rows for each input, zero elsewhere."""
    right = [draw(100 + j, (DIRECTIONS, real_size(x)), np.float64) for j, x in enumerate(p.inputs)]
    left = [draw(200 + i, (1, real_size(y)), np.float64) for i, y in enumerate(outputs)]
    return _block_diagonal(left), _block_diagonal(right)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)))
    row = column = 0
    for b in blocks:
        whole[row : row + b.shape[0], column : column + b.shape[1]] = b
        row, column = row + b.shape[0], column + b.shape[1]
    return whole


def _for_each(fn: Fn, vectors: np.ndarray, width: int) -> np.ndarray:
    """`fn` of every row, stacked: compiled, and without `vmap` where `fn` cannot be batched."""
    if not len(vectors):
        return np.zeros((0, width))
    try:
        return np.asarray(jax.jit(jax.vmap(fn))(jnp.asarray(vectors)))
    except Exception:
        return np.stack([np.asarray(fn(jnp.asarray(v))) for v in vectors])
