"""Solvers of ∇f(x) = 0 that go downhill: Newton's method with conjugate gradients, and L-BFGS where optax is installed.

References: Dembo and Steihaug, "Truncated-Newton algorithms for large-scale unconstrained optimization", 1983; Liu and Nocedal, "On the limited
memory BFGS method for large scale optimization", 1989.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.implicit import vectors as v
from layers.implicit.krylov import CG
from layers.implicit.solvers import Solved, System, halve_until
from layers.implicit.vectors import Vector


@dataclass(frozen=True)
class NewtonCG:
    """Newton steps by conjugate gradients, ended where the curvature turns negative, and halved until f falls. Counts Newton steps.

    Attributes:
        linear_tol: how exactly each linear system is solved.
        linear_steps: the most steps that this may take.
    """

    linear_tol: float = 1e-3
    linear_steps: int = 100

    def solve(self, system: System, x: Vector) -> Solved:
        objective = _objective(system)
        slack = 10 * float(jnp.finfo(v.real_dtype(x)).eps)

        def body(carry: Any) -> Any:
            x, value, r, _, steps = carry
            slope = jax.linearize(system.residual, x)[1]
            p = CG().solve(lambda a: v.times(-1, slope(a)), r, self.linear_tol * v.rms(r), self.linear_steps).x
            p = v.choose(v.dot(p, r) > 0, p, r)
            gain = v.dot(p, r)
            x, value = halve_until(x, p, lambda t, _, new: new > value - 1e-4 * t * gain + slack * jnp.abs(value), objective)
            r = system.residual(x)
            return x, value, r, system.measure(x, r), steps + 1

        r = system.residual(x)
        start = (x, objective(x), r, system.measure(x, r), jnp.zeros((), jnp.int32))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[0], *out[-2:])


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS of optax, with its line search.

    Attributes:
        memory: how many differences are kept.
    """

    memory: int = 10

    def solve(self, system: System, x: Vector) -> Solved:
        objective = _objective(system)
        optax: Any = importlib.import_module("optax")
        method = optax.lbfgs(memory_size=self.memory)
        value_and_grad = optax.value_and_grad_from_state(objective)

        def body(carry: Any) -> Any:
            x, _, state, _, steps = carry
            value, slope = value_and_grad(x, state=state)
            update, state = method.update(slope, state, x, value=value, grad=slope, value_fn=objective)
            return v.plus(x, update), x, state, system.measure(x, slope), steps + 1

        start = (x, x, method.init(x), jnp.full((), jnp.inf, v.real_dtype(x)), jnp.zeros((), jnp.int32))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[1], *out[-2:])


def _objective(system: System) -> Any:
    """The objective, in the dtype of its iterates."""
    objective = system.objective
    if objective is None:
        raise TypeError("a minimiser needs an objective: it is a solver of argmin only")
    return lambda x: objective(x).astype(v.real_dtype(x))
