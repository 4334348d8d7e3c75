"""Solver objects of optimistix and lineax, where these are installed, behind the interface of our own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.implicit import vectors as v
from layers.implicit.krylov import LinearSolved
from layers.implicit.solvers import Solved, System
from layers.implicit.vectors import Map, Vector


@dataclass(frozen=True)
class Optimistix:
    """A solver of optimistix, which stops by its own tolerances; whether x is within ours is looked at afterwards."""

    solver: Any
    minimises: bool

    def solve(self, system: System, x: Vector) -> Solved:
        optx: Any = importlib.import_module("optimistix")
        options: Any = {"max_steps": system.max_steps, "throw": False}
        if self.minimises and system.objective is not None:
            objective = system.objective
            found = optx.minimise(lambda x, _: objective(x), self.solver, x, **options)
        elif isinstance(self.solver, optx.AbstractFixedPointSolver):
            found = optx.fixed_point(lambda x, _: v.plus(x, system.residual(x)), self.solver, x, **options)
        else:
            found = optx.root_find(lambda x, _: system.residual(x), self.solver, x, **options)
        x = found.value
        return Solved(x, system.measure(x, system.residual(x)), jnp.asarray(found.stats["num_steps"], jnp.int32))


@dataclass(frozen=True)
class Lineax:
    """A linear solver of lineax; its residual is looked at afterwards."""

    solver: Any

    def solve(self, a: Map, b: Vector, tol: Any, max_steps: int) -> LinearSolved:
        lx: Any = importlib.import_module("lineax")
        operator = lx.FunctionLinearOperator(a, jax.eval_shape(lambda: b))
        found = lx.linear_solve(operator, b, self.solver, throw=False)
        steps = found.stats.get("num_steps", 0)
        return LinearSolved(found.value, v.rms(v.minus(b, a(found.value))), jnp.asarray(0 if steps is None else steps, jnp.int32))


def optimistix_solver(name: str, solver: Any) -> Optimistix:
    """Wraps a solver of optimistix.

    Raises:
        TypeError: for any other object.
    """
    if type(solver).__module__.split(".")[0] != "optimistix" and not _derives(solver, "optimistix"):
        raise TypeError(f"{name}: solver is a {type(solver).__name__}, but must be a name, a solver of layers.implicit or one of optimistix")
    optx: Any = importlib.import_module("optimistix")
    return Optimistix(solver, isinstance(solver, optx.AbstractMinimiser))


def lineax_solver(name: str, solver: Any) -> Lineax:
    """Wraps a solver of lineax.

    Raises:
        TypeError: for any other object.
    """
    if not _derives(solver, "lineax"):
        raise TypeError(f"{name}: backward is a {type(solver).__name__}, but must be a name, a method of layers.implicit or a solver of lineax")
    return Lineax(solver)


def _derives(solver: Any, library: str) -> bool:
    return any(base.__module__.split(".")[0] == library for base in type(solver).__mro__)
