"""Derivatives of a layer's gradient: one compiled program in float64 serves the arguments, points beside them, and rays from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

STEP = 1e-6
RAYS = (0.0, 1e2, -1e4, 1e4)
"""What the arguments of an example are multiplied by, unless the class names other `rays`."""


class Derivatives(NamedTuple):
    """The outputs of a layer, its gradient, and the derivative of that along a direction; None where it was not asked for."""

    outputs: list[Any]
    gradient: list[Any]
    second: list[Any] | None


Program = Callable[..., Derivatives]
"""`(moved, direction, size=1.0, once=False)`: at these arguments; `size` multiplies the gradients of the outputs."""


def derivatives_of(outputs: Callable[..., list[Any]], weights: Callable[[Any], Any]) -> Callable[..., Derivatives]:
    """Compiles `(others, moved, direction, size=1.0, once=False) -> Derivatives`.

    Args:
        outputs: the layer, of arrays that have no gradient, `others`, and of those that have, `moved`.
        weights: the gradient of an output.
    """

    def run(others: Any, moved: Sequence[Any], direction: Sequence[Any], size: Any, *, once: bool) -> Derivatives:
        def gradient(*moved: Any) -> tuple[list[Any], list[Any]]:
            outs, pull = jax.vjp(functools.partial(outputs, others), *moved)
            return list(pull([(size * weights(y)).astype(y.dtype) for y in outs])), outs

        if once:
            grads, outs = gradient(*moved)
            return Derivatives(outs, grads, None)
        grads, second, outs = jax.jvp(gradient, tuple(moved), tuple(direction), has_aux=True)
        return Derivatives(outs, grads, second)

    compiled = jax.jit(run, static_argnames="once")

    def call(others: Any, moved: Sequence[Any], direction: Sequence[Any], size: float = 1.0, once: bool = False) -> Derivatives:
        return jax.tree.map(np.asarray, compiled(others, list(moved), list(direction), np.float64(size), once=once))

    return call


def direction_at(x: Any, start: int = 1) -> np.ndarray:
    """A direction that has no symmetry, of the shape and dtype of `x`."""
    return np.cos(3 * np.arange(np.size(x)) + start).reshape(np.shape(x)).astype(x.dtype)


def beside(program: Program, moved: Sequence[np.ndarray], direction: Sequence[np.ndarray], **how: Any) -> tuple[Derivatives, Derivatives]:
    """The derivatives a step to either side of the arguments."""
    up, down = (program([x + s * STEP * d for x, d in zip(moved, direction, strict=True)], direction, **how) for s in (1, -1))
    return up, down


def slopes(up: Sequence[np.ndarray], down: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The derivatives along the direction, from the values to either side."""
    return [(a - b) / (2 * STEP) for a, b in zip(up, down, strict=True)]


def nan_on_rays(program: Program, moved: Sequence[np.ndarray], rays: Sequence[float]) -> str | None:
    """Where the gradient or its derivative is NaN though all outputs are finite, at the arguments times each of `rays`; None where they are numbers.

    Each argument is scaled alone, and all together.
    """
    direction = [direction_at(x) for x in moved]
    alone = [(i,) for i in range(len(moved))] if len(moved) > 1 else []
    for chosen in (*alone, tuple(range(len(moved)))):
        for factor in rays:
            outputs, *derivatives = program([factor * x if i in chosen else x for i, x in enumerate(moved)], direction)
            if not all(np.isfinite(y).all() for y in outputs):
                continue
            for what, arrays in zip(("gradient", "second derivative"), derivatives, strict=True):
                i = next((i for i, g in enumerate(arrays or ()) if np.isnan(g).any()), None)
                if i is not None:
                    scaled = f"array {chosen[0]} is" if chosen in alone else "all arrays are"
                    return f"the {what} of array {i} is NaN where {scaled} {factor:g} times the example, and the outputs are finite"
    return None
