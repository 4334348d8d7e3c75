"""Errors that are known only when a program runs: raised at once where values are at hand, from a callback where they are traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from layers.core import compat
from layers.implicit.vectors import Vector


class ConvergenceError(RuntimeError):
    """A solve that did not reach its tolerance, with `throw=True`."""


def raise_unless(converged: Any, x: Vector, what: str, advice: str, tol: float, residual: Any, steps: Any) -> Vector:
    """`x`, where `converged` holds; else an error with the figures: ConvergenceError, inside `jax.jit` as the cause of a JaxRuntimeError.

    Args:
        converged: one flag, under `jax.vmap` one for each element.
        x: where the solve ended.
        what: what failed.
        advice: the options that may help.
        tol, residual, steps: the figures.
    """

    def check(converged: Any, residual: Any, steps: Any) -> Any:
        bad = ~np.asarray(converged)
        if bad.any():
            worst, most = (np.broadcast_to(np.asarray(a), bad.shape)[bad].max() for a in (residual, steps))
            raise ConvergenceError(
                f"{what}: residual {worst:.3g} after {most} steps, tolerance {tol:.3g}{_cause(worst, tol)}. {advice}; "
                "or give throw=False and look at the flag."
            )
        return np.asarray(converged)

    return _tied(check, converged, residual, steps, x)


def _cause(residual: Any, tol: float) -> str:
    if not np.isfinite(residual):
        return ": x has left where f is finite, or started outside"
    return ": it is small only because x has grown, there may be no solution" if residual <= tol else ""


def _tied(check: Callable[..., Any], converged: Any, residual: Any, steps: Any, x: Vector) -> Vector:
    """`x`, available only after the check."""
    if not isinstance(converged, compat.Tracer):
        check(converged, residual, steps)
        return x
    aval = jax.typeof(converged)
    passed = jax.pure_callback(check, jax.ShapeDtypeStruct(aval.shape, aval.dtype), converged, residual, steps, vmap_method="expand_dims")
    return [jax.numpy.where(passed, a, 0) for a in x]
