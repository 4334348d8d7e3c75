"""Guesses at the mistake from a wrong Jacobian and the right one."""

from __future__ import annotations

import numpy as np


def likely_mistake(wrong: np.ndarray, right: np.ndarray, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> str:
    """One sentence. `wrong` and `right` have one row for each entry of the output and one column for each of the input."""
    if not np.isfinite(wrong).all():
        return "the gradient is not finite: something divides by what can be zero"
    if not np.isfinite(right).all():
        return "the function itself is not finite near this point"
    if _close(wrong, 0):
        return "the gradient is zero: the argument is forgotten, or its gradient returned as None"
    if _close(right, 0):
        return "the function does not depend on this argument: gradients of two arguments may be swapped"
    if _close(wrong, -right):
        return "the sign"
    factor = float(np.sum(wrong * right) / np.sum(right * right))
    if _close(wrong, factor * right):
        return f"a constant factor: the gradient is {factor:.4g} times what it should be"
    if len(x_shape) == 2 and len(set(x_shape)) == 1 and _close(wrong.reshape(-1, *x_shape).swapaxes(1, 2), right.reshape(-1, *x_shape)):
        return "the gradient is transposed"
    if wrong.shape[0] == wrong.shape[1] and _close(wrong.T, right):
        return "the Jacobian is transposed: the rule multiplies from the wrong side"
    nonzero = right != 0
    if (wrong[~nonzero] == 0).all() and ((np.abs(wrong - right) < 1e-6 * np.abs(right).max()) | (wrong == 0)).all():
        return "a dropped term: some entries are right and the others are zero, as when a sum over a broadcast axis is left out"
    share = float(np.mean(np.abs(wrong - right) > 1e-5 * np.abs(right).max()))
    if share < 0.1:
        return f"single entries: {share:.1%} are wrong, as at a boundary or a special case"
    return "a dropped or wrong term: the error is no constant factor"


def likely_second_mistake(wrong: np.ndarray, right: np.ndarray, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> str:
    """The same for the Jacobian of a gradient, where `wrong` is what JAX makes of the operations of the rules."""
    first = likely_mistake(wrong, right, x_shape, y_shape)
    if "zero: the argument" not in first and "term" not in first:
        return first
    return (
        "backward hides a dependence: what it uses of the arguments went through stop_gradient, NumPy or a rule that JAX cannot see through, "
        "so the derivative of the gradient lacks a term; save the arguments themselves, or decorate backward with once_differentiable"
    )


def _close(a: np.ndarray, b: np.ndarray | float) -> bool:
    scale = max(float(np.abs(a).max(initial=0)), float(np.abs(b).max(initial=0)) if isinstance(b, np.ndarray) else 0.0)
    return bool(np.abs(a - b).max(initial=0) <= 1e-4 * scale) if isinstance(b, np.ndarray) else bool(np.abs(a - b).max(initial=0) <= 1e-12)
