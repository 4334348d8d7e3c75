"""Solvers of F(x) = 0 that need no derivative but F itself: iteration, Anderson acceleration, Broyden's method; and Newton's with GMRES.

A fixed point of f is a root of F(x) = f(x) - x. Iteration and Anderson go along F, so they expect the Jacobian of F to lie near -1.

References: Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011 (type II, differences); Broyden, "A class of methods for
solving nonlinear simultaneous equations", 1965, with the inverse Jacobian as a sum of rank-one terms; Knoll and Keyes, "Jacobian-free
Newton-Krylov methods", 2004.

A step may leave the domain of F, where F is not finite. Anderson and Broyden then go half of it, again and again, Newton shortens it until it stays
inside; iteration goes no step but its own and ends. What is returned is an x at which F was finite, but for an x0 at which it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.lengths import power_of_two
from layers.implicit import vectors as v
from layers.implicit.krylov import GMRES, solve_relative
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

    def ran_away(self, x0: Vector, x: Vector) -> Any:
        """Whether F(x) is small beside x only, since x has grown: not beside x0, nor as what a small change of x, √tol of it, does to F."""
        r, turn = jax.jvp(self.residual, (x,), (x,))
        size = v.rms(r)
        return ~((size <= self.tol * (1 + v.rms(x0))) | (size <= self.tol**0.5 * v.rms(turn)))

    def evaluate(self, x: Vector, residual: Any, steps: Any) -> tuple[Vector, Any, Any]:
        """F(x), its size, and how far off x is: where F is not finite, that of before; NaN, which ends a loop, where there is none."""
        r = self.residual(x)
        size = v.rms(r)
        return r, size, jnp.where(size < jnp.inf, self.measure(x, r), jnp.where(steps > 0, residual, jnp.nan))


@dataclass(frozen=True)
class Iteration:
    """x ← x + F(x): for a fixed point, f again and again. Holds two vectors. It stops at the x that it measured, not one step on.

    A step that leaves the domain of f ends it.
    """

    def solve(self, system: System, x: Vector) -> Solved:
        def body(carry: Any) -> Any:
            x, _, steps = carry
            r = system.residual(x)
            residual, steps = system.measure(x, r), steps + 1
            return v.choose(system.goes_on(residual, steps), v.plus(x, r), x), residual, steps

        return Solved(*v.while_loop(lambda c: system.goes_on(*c[1:]), body, (x, *_nothing_yet(x))))


class _Good(NamedTuple):
    """The last point at which F is finite: x, F(x) and the root mean square of that, which is 0 as long as there is none."""

    x: Vector
    r: Vector
    size: Any

    @classmethod
    def nowhere(cls, x: Vector) -> _Good:
        return cls(x, v.times(0, x), jnp.zeros((), v.real_dtype(x)))

    def to(self, x: Vector, r: Vector, size: Any) -> tuple[Vector, Vector]:
        """How x and F differ there, by a power of two smaller, so that F can be squared; 0 where F is not finite, and where there is no self."""
        usable = (self.size > 0) & (size < jnp.inf)
        unit = 1 / power_of_two(jnp.maximum(size, self.size))
        scaled = lambda new, old: [jnp.where(usable, (a - b) * unit, 0) for a, b in zip(new, old, strict=True)]
        return scaled(x, self.x), scaled(r, self.r)

    def then(self, after: Vector, x: Vector, r: Vector, size: Any) -> tuple[Vector, _Good]:
        """The next x and the new self: if F is not finite at x, halfway back to self and self."""
        inside = size < jnp.inf
        halfway = [(a + b) / 2 for a, b in zip(x, self.x, strict=True)]
        good = _Good(v.choose(inside, x, self.x), v.choose(inside, r, self.r), jnp.where(inside, size, self.size))
        return v.choose(inside, after, halfway), good


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
            x, good, xs, rs, gram, residual, steps = carry
            r, size, residual = system.evaluate(x, residual, steps)
            dx, dr = good.to(x, r, size)
            slot = (steps - 1) % m
            xs, rs = v.put(xs, slot, dx), v.put(rs, slot, dr)
            row = v.dots(rs, dr)
            gram = gram.at[slot].set(row).at[:, slot].set(row)
            weights = _least_squares(gram, v.dots(rs, r), ridge)
            along, back = v.combine(weights, xs), v.combine(weights, rs)
            after = [a + self.mixing * (b - d) - c for a, b, c, d in zip(x, r, along, back, strict=True)]
            return *good.then(after, x, r, size), xs, rs, gram, residual, steps + 1

        empty = v.stack_of_zeros(m, x)
        start = (x, _Good.nowhere(x), empty, empty, jnp.zeros((m, m), dtype), *_nothing_yet(x))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[1].x, *out[-2:])


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method: the inverse Jacobian as -1 and the last `memory` rank-one corrections. Holds 2 memory + 4 vectors."""

    memory: int = 10

    def solve(self, system: System, x: Vector) -> Solved:
        m = self.memory

        def body(carry: Any) -> Any:
            x, good, us, vs, residual, steps = carry
            r, size, residual = system.evaluate(x, residual, steps)
            dx, dr = good.to(x, r, size)
            moved = v.minus(v.combine(v.dots(vs, dr), us), dr)
            direction = v.minus(v.combine(v.dots(us, dx), vs), dx)
            pivot = v.dot(direction, dr)
            usable = jnp.abs(pivot) > 0
            correction = v.times(jnp.where(usable, 1 / jnp.where(usable, pivot, 1), 0), v.minus(dx, moved))
            slot = (steps - 1) % m
            us, vs = v.put(us, slot, correction), v.put(vs, slot, direction)
            after = v.minus(v.plus(x, r), v.combine(v.dots(vs, r), us))
            return *good.then(after, x, r, size), us, vs, residual, steps + 1

        empty = v.stack_of_zeros(m, x)
        start = (x, _Good.nowhere(x), empty, empty, *_nothing_yet(x))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]), body, start)
        return Solved(out[1].x, *out[-2:])


@dataclass(frozen=True)
class Newton:
    """Newton's method: each step by GMRES, halved until the residual falls. Counts Newton steps. It ends where no step stays in the domain of f.

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
            x, size, r, _, _, steps = carry
            slope = jax.linearize(system.residual, x)[1]
            p = solve_relative(GMRES(self.restart), lambda a: v.times(-1, slope(a)), r, self.linear_tol, self.linear_steps)
            x, size, r, moved = shorten(x, p, size, r, lambda t, new: new <= (1 - 1e-4 * t) * size, evaluate)
            return x, size, r, moved, system.measure(x, r), steps + 1

        def evaluate(x: Vector) -> tuple[Any, Vector]:
            r = system.residual(x)
            return v.rms(r), r

        size, r = evaluate(x)
        start = (x, size, r, size < jnp.inf, system.measure(x, r), jnp.zeros((), jnp.int32))
        out = v.while_loop(lambda c: system.goes_on(*c[-2:]) & c[3], body, start)
        return Solved(out[0], *out[-2:])


def shorten(
    x: Vector, p: Vector, value: Any, more: Any, enough: Callable[[Any, Any], Any], evaluate: Callable[[Vector], tuple[Any, Any]]
) -> tuple[Vector, Any, Any, Any]:
    """A step along p: x + t p for the first t of 1, 1/2, ..., 1/1024 whose value is enough; the last of these else. Where that still is not finite
    t goes on to half the epsilon of the dtype, and there is no step where no value is finite.

    Args:
        x, p: where the step starts, and the whole step.
        value, more: what `evaluate` gives at x: a number, and anything computed with it.
        enough: `(t, value) -> bool`, False for what is not a number.
        evaluate: of a point.

    Returns:
        The point, its value and what came with it, and whether there was a step.
    """
    least = float(jnp.finfo(v.real_dtype(x)).eps) / 2

    def at(t: Any) -> Any:
        return t, *evaluate(v.plus(x, p, t))

    def go_on(carry: Any) -> Any:
        t, value, _ = carry
        inside = jnp.abs(value) < jnp.inf
        return ~(enough(t, value) & inside) & (t > jnp.where(inside, 1e-3, least))

    t, new, with_it = v.while_loop(go_on, lambda c: at(c[0] / 2), at(jnp.ones((), v.real_dtype(x))))
    moved = jnp.abs(new) < jnp.inf
    keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(moved, x, y), a, b)
    return v.choose(moved, v.plus(x, p, t), x), keep(new, value), keep(with_it, more), moved


def _nothing_yet(x: Vector) -> tuple[jax.Array, jax.Array]:
    return jnp.full((), jnp.inf, v.real_dtype(x)), jnp.zeros((), jnp.int32)


def _least_squares(gram: jax.Array, rhs: jax.Array, ridge: float) -> jax.Array:
    """The weights of the vectors with this Gram matrix that come nearest to a vector with these products; 0 for a vector of zeros."""
    scale = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(scale > 0, scale, 1)
    used = (jnp.diagonal(gram) > 0).astype(gram.dtype)
    matrix = gram / scale / scale[:, None] + jnp.diag(1 - used + ridge)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), rhs / scale) / scale
