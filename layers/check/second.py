"""The clauses of the contract on the derivative of the gradient: that it is right, and that both are numbers far out and at zero.

One compiled program in float64 gives the outputs, the gradient and the derivative of that along one direction: at the arguments, beside them, and
along rays from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STEP = 1e-6
RAYS = (0.0, 1e2, -1e4, 1e4)
"""What the arguments of an example are multiplied by, unless the class names other `rays`."""

Second = Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], list[Any], list[Any]]]


def second_derivative(outputs: Callable[..., list[Any]], weights: Callable[[Any], Any]) -> Second:
    """A compiled `(arguments, direction) -> (outputs, gradient, derivative of the gradient along the direction)`.

    Args:
        outputs: the layer as a function of its floating-point arrays; returns those of its result.
        weights: the gradient of an output.
    """

    def run(moved: Sequence[Any], direction: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        def gradient(*moved: Any) -> tuple[list[Any], list[Any]]:
            outs, pull = jax.vjp(outputs, *moved)
            return list(pull([jnp.asarray(weights(y)) for y in outs])), outs

        grads, dots, outs = jax.jvp(gradient, tuple(moved), tuple(direction), has_aux=True)
        return outs, grads, dots

    compiled = jax.jit(run)
    return lambda moved, direction: jax.tree.map(np.asarray, compiled(list(moved), list(direction)))


def direction_at(x: Any) -> np.ndarray:
    """A direction that has no symmetry, of the shape and dtype of `x`."""
    return np.cos(3 * np.arange(np.size(x)) + 1).reshape(np.shape(x)).astype(x.dtype)


def beside(second: Second, moved: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
    """The derivative of the gradient, and the same by differences of the gradient."""
    direction = [direction_at(x) for x in moved]
    up, down = (second([x + s * STEP * d for x, d in zip(moved, direction, strict=True)], direction)[1] for s in (1, -1))
    return second(moved, direction)[2], [(a - b) / (2 * STEP) for a, b in zip(up, down, strict=True)]


def nan_on_rays(second: Second, moved: Sequence[np.ndarray], rays: Sequence[float]) -> str | None:
    """Where the gradient or its derivative is NaN though all outputs are finite, at the arguments times each of `rays`; None where they are numbers.

    Each argument is scaled alone, and all together.
    """
    direction = [direction_at(x) for x in moved]
    alone = [(i,) for i in range(len(moved))] if len(moved) > 1 else []
    for chosen in (*alone, tuple(range(len(moved)))):
        for factor in rays:
            outputs, *derivatives = second([factor * x if i in chosen else x for i, x in enumerate(moved)], direction)
            if not all(np.isfinite(y).all() for y in outputs):
                continue
            for what, arrays in zip(("gradient", "second derivative"), derivatives, strict=True):
                i = next((i for i, g in enumerate(arrays) if np.isnan(g).any()), None)
                if i is not None:
                    scaled = f"array {chosen[0]} is" if chosen in alone else "all arrays are"
                    return f"the {what} of array {i} is NaN where {scaled} {factor:g} times the example, and the outputs are finite"
    return None
