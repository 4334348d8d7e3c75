"""From what a user writes for `solver=` and `backward=` to the object that solves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layers.core import checks
from layers.implicit import linear, outside
from layers.implicit.rule import Convergence, Equation, ImplicitFunction
from layers.implicit.traced import Traced

MOST_STEPS = "[1, 2147483647]"
"""Steps that an int32 counts."""


@dataclass(frozen=True)
class Choices:
    """The options of `fixed_point`, `root` and `argmin` as they are given."""

    solver: Any
    tol: Any
    max_steps: Any
    backward: Any
    backward_tol: Any
    backward_steps: Any
    throw: Any


@dataclass(frozen=True)
class Options:
    """The same as objects that solve."""

    name: str
    solver: Any
    tol: float | None
    max_steps: int
    linear: linear.LinearSystem
    throw: bool

    def solve(
        self, function: type[ImplicitFunction], f: Callable[[Any, Any], Any], traced: Traced, *, fixed: bool = False, objective: Any = None
    ) -> tuple[Any, Convergence]:
        """x where f(x, θ) is 0, or x itself where `fixed`, for the x and θ of `traced`, and how well."""
        equation = Equation(self.name, f, fixed, self.solver, self.linear, self.tol, self.max_steps, self.throw, objective)
        x, convergence = function.apply(equation, traced.x, traced.theta)
        return traced.structure.unflatten(x), convergence


def read(name: str, solvers: Mapping[str, Any], given: Choices, *, series: bool = False) -> Options:
    """The options, each of which is looked at; `series` says whether a few terms of a series will do for the linear systems."""
    tol = checks.number(name, "tol", given.tol, "[0, inf)", optional=True)
    max_steps = checks.integer(name, "max_steps", given.max_steps, MOST_STEPS)
    backward_tol = checks.number(name, "backward_tol", given.backward_tol, "[0, inf)", optional=True)
    backward_steps = checks.integer(name, "backward_steps", given.backward_steps, MOST_STEPS, optional=True)
    throw = checks.flag(name, "throw", given.throw)
    system = linear_system(name, given.backward, backward_tol, backward_steps, throw, series=series)
    return Options(name, forward_solver(name, given.solver, solvers), tol, max_steps, system, throw)


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
