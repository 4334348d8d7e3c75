"""Solvers of F(x) = 0 that need no derivative but F itself: iteration, Anderson acceleration, Broyden's method; and Newton's with GMRES.

A fixed point of f is a root of F(x) = f(x) - x. Iteration and Anderson go along F, so they expect the Jacobian of F to lie near -1.

References: Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011 (type II, differences); Broyden, "A class of methods for
solving nonlinear simultaneous equations", 1965, with the inverse Jacobian as a sum of rank-one terms; Knoll and Keyes, "Jacobian-free
Newton-Krylov methods", 2004.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.implicit import vectors as v
from layers.implicit.krylov import GMRES
from layers.implicit.vectors import Map, Vector


class Solved(NamedTuple):
    """What a solver returns: where it stopped, how far off that x is, and after how many evaluations of F."""

    x: Vector
    residual: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class System:
    """F(x) = 0, and when to stop.

    Attributes:
        residual: F.
        measure: `(x, F(x)) -> scalar`, how far off x is.
        tol: what that must not exceed.
        max_steps: the most evaluations of F.
        objective: the function whose gradient is -F, where there is one.
    """

    residual: Map
    measure: Callable[[Vector, Vector], jax.Array]
    tol: float
    max_steps: int
    objective: Callable[[Vector], jax.Array] | None = None

    def goes_on(self, residual: Any, steps: Any) -> Any:
        return (residual > self.tol) & (steps < self.max_steps)


@dataclass(frozen=True)
class Iteration:
    """x ← x + F(x): for a fixed point, f again and again. Holds two vectors. It stops at the x that it measured, not one step on."""

    def solve(self, system: System, x: Vector) -> Solved:
        def body(carry: Any) -> Any:
            x, _, steps = carry
            r = system.residual(x)
            residual, steps = system.measure(x, r), steps + 1
            return v.choose(system.goes_on(residual, steps), v.plus(x, r), x), residual, steps

        return Solved(*v.while_loop(lambda c: system.goes_on(*c[1:]), body, (x, *_nothing_yet(x))))


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: the step from the last `memory` differences that make the residual least. Holds 2 memory + 4 vectors.

    Attributes:
        memory: how many differences are kept.
        mixing: the factor of the residual in a step.
    """

    memory: int = 5
    mixing: float = 1.0

    def solve(self, system: System, x: Vector) -> Solved:
        m, dtype = self.memory, v.real_dtype(x)
        ridge = 10 * m * float(jnp.finfo(dtype).eps)

        def body(carry: Any) -> Any:
            x, x_before, r_before, xs, rs, gram, _, steps = carry
            r = system.residual(x)
            slot = (steps - 1) % m
            dx, dr = v.minus(x, x_before), v.choose(steps > 0, v.minus(r, r_before), v.times(0, r))
            xs, rs = v.put(xs, slot, dx), v.put(rs, slot, dr)
            row = v.dots(rs, dr)
            gram = gram.at[slot].set(row).at[:, slot].set(row)
            weights = _least_squares(gram, v.dots(rs, r), ridge)
            along, back = v.combine(weights, xs), v.combine(weights, rs)
            after = [a + self.mixing * (b - d) - c for a, b, c, d in zip(x, r, along, back, strict=True)]
            return after, x, r, xs, rs, gram, system.measure(x, r), steps + 1

        empty = v.stack_of_zeros(m, x)
        start = (x, x, v.times(0, x), empty, empty, jnp.zeros((m, m), dtype), *_nothing_yet(x))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[1], *out[-2:])


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method: the inverse Jacobian as -1 and the last `memory` rank-one corrections. Holds 2 memory + 4 vectors."""

    memory: int = 10

    def solve(self, system: System, x: Vector) -> Solved:
        m = self.memory

        def body(carry: Any) -> Any:
            x, x_before, r_before, us, vs, _, steps = carry
            r = system.residual(x)
            dx, dr = v.minus(x, x_before), v.minus(r, r_before)
            moved = v.minus(v.combine(v.dots(vs, dr), us), dr)
            direction = v.minus(v.combine(v.dots(us, dx), vs), dx)
            pivot = v.dot(direction, dr)
            usable = (steps > 0) & (pivot != 0)
            correction = v.times(jnp.where(usable, 1 / jnp.where(usable, pivot, 1), 0), v.minus(dx, moved))
            slot = (steps - 1) % m
            us, vs = v.put(us, slot, correction), v.put(vs, slot, direction)
            after = v.minus(v.plus(x, r), v.combine(v.dots(vs, r), us))
            return after, x, r, us, vs, system.measure(x, r), steps + 1

        empty = v.stack_of_zeros(m, x)
        start = (x, x, v.times(0, x), empty, empty, *_nothing_yet(x))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[1], *out[-2:])


@dataclass(frozen=True)
class Newton:
    """Newton's method: each step by GMRES, halved until the residual falls. Counts Newton steps.

    Attributes:
        restart: the steps after which GMRES starts again; None as in `GMRES`.
        linear_tol: how exactly that is solved.
        linear_steps: the most steps that this may take.
    """

    restart: int | None = None
    linear_tol: float = 1e-3
    linear_steps: int = 200

    def solve(self, system: System, x: Vector) -> Solved:
        def body(carry: Any) -> Any:
            x, r, _, steps = carry
            slope = jax.linearize(system.residual, x)[1]
            p = GMRES(self.restart).solve(lambda a: v.times(-1, slope(a)), r, self.linear_tol * v.rms(r), self.linear_steps).x
            x, r = halve_until(x, p, lambda t, y, r_new: v.rms(r_new) > (1 - 1e-4 * t) * v.rms(r), system.residual)
            return x, r, system.measure(x, r), steps + 1

        r = system.residual(x)
        start = (x, r, system.measure(x, r), jnp.zeros((), jnp.int32))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[0], *out[-2:])


def halve_until(x: Vector, p: Vector, too_far: Callable[[Any, Vector, Any], Any], evaluate: Callable[[Vector], Any]) -> tuple[Vector, Any]:
    """x + t p and its value, for the first t of 1, 1/2, ..., 1/1024 that is not too far; the last one else."""

    def at(t: Any) -> Any:
        y = v.plus(x, p, t)
        return t, y, evaluate(y)

    go_on = lambda c: ~(~too_far(*c)) & (c[0] > 1e-3)
    return v.while_loop(go_on, lambda c: at(c[0] / 2), at(jnp.ones((), v.real_dtype(x))))[1:]


def _nothing_yet(x: Vector) -> tuple[jax.Array, jax.Array]:
    return jnp.full((), jnp.inf, v.real_dtype(x)), jnp.zeros((), jnp.int32)


def _least_squares(gram: jax.Array, rhs: jax.Array, ridge: float) -> jax.Array:
    """The weights of the vectors with this Gram matrix that come nearest to a vector with these products; 0 for a vector of zeros."""
    scale = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(scale > 0, scale, 1)
    used = (jnp.diagonal(gram) > 0).astype(gram.dtype)
    matrix = gram / scale / scale[:, None] + jnp.diag(1 - used + ridge)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), rhs / scale) / scale
