"""From what a user writes for `solver=` and `backward=` to the object that solves."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from layers.implicit import linear, outside


def checked(name: str, **options: Any) -> None:
    """Raises ValueError for a tolerance that is negative or a number of steps that is not positive."""
    for key, value in options.items():
        if value is None:
            continue
        if key.endswith("tol") and not value >= 0:
            raise ValueError(f"{name}: {key} is {value}, but must not be negative")
        if key.endswith("steps") and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
            raise ValueError(f"{name}: {key} is {value!r}, but must be a whole number of at least 1")


def forward_solver(name: str, solver: Any, known: Mapping[str, Any]) -> Any:
    """The solver of this name, or itself."""
    if isinstance(solver, str):
        return _named(name, "solver", solver, known)
    if isinstance(solver, tuple(type(s) for s in known.values())):
        return solver
    return outside.optimistix_solver(name, solver)


def linear_system(name: str, method: Any, tol: float | None, steps: int | None, throw: bool, *, series: bool = False) -> linear.LinearSystem:
    """How the linear systems of the derivative are solved; `series` says whether a few terms of one will do."""
    known = {k: m for k, m in linear.METHODS.items() if series or not hasattr(m, "series")}
    if isinstance(method, str):
        method = _named(name, "backward", method, known)
        if isinstance(method, linear.Neumann) and steps is not None:
            method = linear.Neumann(steps)
    elif not isinstance(method, tuple(type(m) for m in known.values())):
        method = outside.lineax_solver(name, method)
    return linear.LinearSystem(name, method, tol, 200 if steps is None else steps, throw)


def _named(name: str, option: str, value: str, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise ValueError(f"{name}: {option} is {value!r}, but must be one of {', '.join(map(repr, known))}, or a solver object")
    return known[value]
