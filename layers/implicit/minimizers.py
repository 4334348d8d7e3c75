"""Solvers of ∇f(x) = 0 that go downhill: Newton's method with conjugate gradients, and L-BFGS.

Both shorten a step p = H r, r = -∇f, until f falls by a share of what its slope promises (Armijo), f(x + t p) ≤ f(x) - t (p·r) / 10⁴: a step out of
the domain of f, where f is no finite number, is never taken.

L-BFGS has for H the inverse Hessian that the last differences s of x and y of ∇f imply, started from γ = (s·y) / (y·y) of the last:

    q ← r;   newest to oldest: α = (s·q) / (s·y), q ← q - α y;   p ← γ q;   oldest to newest: p ← p + (α - (y·p) / (s·y)) s

A pair with s·y not positive, which a shortened step can have, is left out.

References: Dembo and Steihaug, "Truncated-Newton algorithms for large-scale unconstrained optimization", 1983; Liu and Nocedal, "On the limited
memory BFGS method for large scale optimization", 1989; Nocedal and Wright, "Numerical Optimization", 2006, algorithms 3.1 and 7.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.lengths import length, power_of_two
from layers.implicit import vectors as v
from layers.implicit.krylov import CG, solve_relative
from layers.implicit.solvers import Solved, System, shorten
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

        def body(carry: Any) -> Any:
            x, value, r, _, _, steps = carry
            slope = jax.linearize(system.residual, x)[1]
            p = solve_relative(CG(), lambda a: v.times(-1, slope(a)), r, self.linear_tol, self.linear_steps)
            x, value, moved = go_down(x, p, value, r, objective)
            r = system.residual(x)
            return x, value, r, moved, system.measure(x, r), steps + 1

        r = system.residual(x)
        start = (x, objective(x), r, v.rms(r) < jnp.inf, system.measure(x, r), jnp.zeros((), jnp.int32))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]) & c[3], body, start)
        return Solved(out[0], *out[-2:])


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with steps halved until f falls. Holds 2 memory + 5 vectors. Counts steps.

    Attributes:
        memory: how many differences are kept.
    """

    memory: int = 10

    def solve(self, system: System, x: Vector) -> Solved:
        m, r = self.memory, system.residual(x)
        scale = power_of_two(v.rms(r))  # the steps are those of f / scale, whose slopes can be squared
        objective = lambda x: _objective(system)(x) / scale

        def body(carry: Any) -> Any:
            x, value, r, pairs, _, _, steps = carry
            x_new, value, moved = go_down(x, pairs.direction(r, steps), value, r, objective)
            r_new = v.times(1 / scale, system.residual(x_new))
            pairs = pairs.put(steps % m, v.minus(x_new, x), v.minus(r, r_new))
            return x_new, value, r_new, pairs, moved, system.measure(x_new, v.times(scale, r_new)), steps + 1

        unit = v.times(1 / scale, r)
        empty, dtype = v.stack_of_zeros(m, r), v.real_dtype(x)  # the gradient lies as the steps will, x may not yet
        pairs = _Pairs(empty, empty, jnp.zeros(m, dtype), 1 / jnp.maximum(length(unit), 1))
        start = (x, objective(x), unit, pairs, v.rms(r) < jnp.inf, system.measure(x, r), jnp.zeros((), jnp.int32))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]) & c[-3], body, start)
        return Solved(out[0], *out[-2:])


class _Pairs(NamedTuple):
    """The last differences of x and of the gradient, 1 / (s·y) of each, 0 for one that is not used, and γ."""

    s: Vector
    y: Vector
    inverse: jax.Array
    gamma: jax.Array

    def put(self, slot: Any, s: Vector, y: Vector) -> _Pairs:
        product, square = v.dot(s, y), v.dot(y, y)
        usable = (product > jnp.finfo(product.dtype).eps * square) & (product < jnp.inf) & (square < jnp.inf)
        inverse, gamma = (jnp.where(usable, a / jnp.where(usable, b, 1), c) for a, b, c in ((1, product, 0), (product, square, self.gamma)))
        return _Pairs(v.put(self.s, slot, s), v.put(self.y, slot, y), self.inverse.at[slot].set(inverse), gamma)

    def direction(self, r: Vector, steps: Any) -> Vector:
        """H r, where the newest pair is in the slot before `steps`."""
        m = len(self.inverse)

        def back(carry: Any) -> Any:
            i, q, alphas = carry
            slot = (steps - 1 - i) % m
            alpha = self.inverse[slot] * v.dot(v.take(self.s, slot), q)
            return i + 1, v.plus(q, v.take(self.y, slot), -alpha), alphas.at[slot].set(alpha)

        def forth(carry: Any) -> Any:
            i, p = carry
            slot = (steps + i) % m
            beta = self.inverse[slot] * v.dot(v.take(self.y, slot), p)
            return i + 1, v.plus(p, v.take(self.s, slot), alphas[slot] - beta)

        zero = jnp.zeros((), jnp.int32)
        _, q, alphas = v.while_loop(lambda c: c[0] < m, back, (zero, r, jnp.zeros_like(self.inverse)))
        return v.while_loop(lambda c: c[0] < m, forth, (zero, v.times(self.gamma, q)))[1]


def go_down(x: Vector, p: Vector, value: Any, r: Vector, objective: Any) -> tuple[Vector, Any, Any]:
    """A step along p, or along r where p does not go down, shortened until the objective falls; its value; and whether there was one."""
    p = v.choose(v.dot(p, r) > 0, p, r)
    gain, slack = v.dot(p, r), 10 * float(jnp.finfo(v.real_dtype(x)).eps)
    gain = jnp.where(gain < jnp.inf, gain, 0)

    def enough(t: Any, new: Any) -> Any:
        return (new <= value - 1e-4 * t * gain + slack * jnp.abs(value)) | ~(jnp.abs(value) < jnp.inf)

    x, value, _, moved = shorten(x, p, value, (), enough, lambda x: (objective(x), ()))
    return x, value, moved


def _objective(system: System) -> Any:
    """The objective, in the dtype of its iterates."""
    objective = system.objective
    if objective is None:
        raise TypeError("a minimiser needs an objective: it is a solver of argmin only")
    return lambda x: objective(x).astype(v.real_dtype(x))
