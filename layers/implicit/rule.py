"""The derivative of a solution by the implicit function theorem.

    F(x, θ) = 0,   so   F_x dx + F_θ dθ = 0,   dx = A⁻¹ F_θ dθ   with A = -F_x

Forward   x from any solver, which the derivative does not depend on
Backward  Aᵀ λ = dx̄,   dθ̄ = F_θᵀ λ;   the gradient of the starting point is 0
Tangent   A dx = F_θ dθ

A is used through products only: F is linearised once at (x, θ), and each step of the linear solver is one product with its transpose. For a
fixed point, F = f - x and A = 1 - f_x.

Saved     x and θ. No iterate is kept, so memory does not grow with the number of steps.

The solution that is saved comes from a call of this rule, and the linear systems are solved by `jax.lax.custom_linear_solve`: so derivatives of
any order are right, in both modes.

Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019; Blondel et al., "Efficient and Modular Implicit Differentiation", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import compat
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.trees import replaced
from layers.function.function import Function
from layers.implicit import vectors as v
from layers.implicit.failure import raise_unless
from layers.implicit.linear import LinearSystem, default_tolerance
from layers.implicit.solvers import Newton, System
from layers.implicit.vectors import Map, Vector


class Convergence(NamedTuple):
    """How a solve by `fixed_point`, `root` or `argmin` ended: how far it is from a solution, and after how many steps.

    Attributes:
        residual: the root mean square of F(x) divided by 1 plus that of x; what `tol` bounds. Both are taken over all entries of x, the whole
            batch: one bad sample can hide among many good ones. `jax.vmap` over the samples solves and measures each for itself. NaN where x, F
            or the objective is not finite there.
        iterations: the steps that the solver took.
        converged: whether the residual is within `tol`, and for a root or a minimum not only because x has grown, as where there is none.
    """

    residual: Any
    iterations: Any
    converged: Any


@dataclass(frozen=True, eq=False)
class Equation:
    """F(x, θ) = 0 and how to solve it. All arrays are in θ.

    Attributes:
        name: the public function, for messages.
        function: `(x, theta) -> f`, x and f lists of arrays of the same shapes.
        fixed: whether F = f - x, a fixed point; else F = -f, a root.
        solver: has `solve(system, x) -> Solved`.
        linear: solves the linear systems of the derivative.
        tol: of the solver; None for `default_tolerance` of the dtype of x.
        max_steps: the most steps of the solver.
        throw: whether a solve that did not converge raises.
        objective: `(x, theta) -> scalar` whose gradient is f, where there is one.
    """

    name: str
    function: Callable[[Any, Any], Any]
    fixed: bool
    solver: Any
    linear: LinearSystem
    tol: float | None = None
    max_steps: int = 100
    throw: bool = False
    objective: Callable[[Any, Any], Any] | None = None

    def solved_by(self, solver: Any, method: Any, **limits: Any) -> Equation:
        """The same, by other solvers of it and of its linear systems, with the same `tol`, `max_steps` and `throw` for both where they are given."""
        return replace(self, solver=solver, linear=replace(self.linear, method=method, **limits), **limits)

    def wide(self, dtypes: Sequence[Any]) -> Callable[[Vector, Any], Vector]:
        """f from and to arrays of float32 or wider, seeing them in these dtypes."""
        return lambda x, theta: widen(self.function(cast(x, dtypes), theta))

    def solve(self, x0: Vector, theta: Any) -> tuple[Vector, Convergence]:
        """The solution and how it was reached; not differentiable."""
        dtypes = [x.dtype for x in x0]
        tol = default_tolerance(dtypes) if self.tol is None else self.tol
        f, objective = self.wide(dtypes), self.objective
        x0 = compat.vary_like(widen(x0), lambda x: f(x, theta), theta)
        system = System(
            (lambda x: v.minus(f(x, theta), x)) if self.fixed else (lambda x: v.times(-1, f(x, theta))),
            _measure,
            tol,
            self.max_steps,
            None if objective is None else lambda x: objective(cast(x, dtypes), theta),
        )
        x, error, steps = self.solver.solve(system, x0)
        inside = v.rms(widen(cast(x, dtypes))) < jnp.inf
        if system.objective is not None:
            inside &= jnp.abs(system.objective(x)) < jnp.inf
        error = jnp.where(inside, error, jnp.nan)
        converged = error <= tol
        if not self.fixed:
            converged &= ~system.ran_away(x0, x)
        if self.throw:
            x = raise_unless(converged, x, f"{self.name}: the solve did not converge", _advice(self.solver), tol, error, steps)
        return cast(x, dtypes), Convergence(error, steps, converged)

    def linear_solve(self, slope: Map, b: Vector, dtypes: Sequence[Any]) -> Vector:
        """A⁻¹ b for a fixed point, -A⁻¹ b for a root, where `slope` is a product with the Jacobian of f or with its transpose."""
        if self.fixed:
            return self.linear.solve(lambda a: v.minus(a, slope(a)), b, dtypes, complement=slope)
        return v.times(-1, self.linear.solve(slope, b, dtypes))


def _measure(x: Vector, r: Vector) -> jax.Array:
    """rms(r) / (1 + rms(x)), NaN where x is not finite."""
    size = v.rms(x)
    return jnp.where(size < jnp.inf, v.rms(r) / (1 + size), jnp.nan)


def _advice(solver: Any) -> str:
    newton = "solve its linear systems further, solver=Newton(restart=..., linear_steps=...); " if isinstance(solver, Newton) else ""
    return f"Allow more steps, max_steps=..., or a larger residual, tol=...; {newton}take another solver=... or another x0"


class ImplicitFunction(Function):
    rays = ()  # far out a solver diverges, and gradients of what did not converge are NaN

    @staticmethod
    def forward(ctx, equation, x0, theta):
        x0, theta = jax.tree.map(jnp.asarray, (x0, theta))  # a differentiated Python number arrives as a number
        if ctx.requires_grad:
            x, convergence = ImplicitFunction.apply(equation, x0, theta)
        else:
            x, convergence = equation.solve(x0, theta)
        ctx.equation = equation
        ctx.save_for_backward(x, theta)
        ctx.mark_non_differentiable(*convergence)
        return x, convergence

    @staticmethod
    def backward(ctx, dx, _):
        (x, theta), dx = barrier(ctx.saved_tensors, dx)
        equation, dtypes = ctx.equation, [a.dtype for a in x]
        differentiated, rebuild = floating(theta)
        pull = jax.vjp(lambda x, differentiated: equation.wide(dtypes)(x, rebuild(differentiated)), widen(x), differentiated)[1]
        adjoint = equation.linear_solve(lambda a: pull(a)[0], widen(dx), dtypes)
        return None, None, rebuild(pull(adjoint)[1], None) if differentiated else None

    @staticmethod
    def jvp(ctx, _equation, _x0, dtheta):
        x, theta = ctx.saved_tensors
        equation, dtypes = ctx.equation, [a.dtype for a in x]
        differentiated, rebuild = floating(theta)
        f = equation.wide(dtypes)
        forced = jax.jvp(lambda differentiated: f(widen(x), rebuild(differentiated)), (differentiated,), (jax.tree.leaves(dtheta),))[1]
        push = jax.linearize(lambda x: f(x, theta), widen(x))[1]
        return equation.linear_solve(push, forced, dtypes), None


def widen(x: Sequence[Any]) -> Vector:
    """Every array in float32 or wider."""
    return [a.astype(wide(a.dtype)) for a in x]


def cast(x: Sequence[Any], dtypes: Sequence[Any]) -> Vector:
    return [a.astype(d) for a, d in zip(x, dtypes, strict=True)]


def floating(tree: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The floating-point and complex leaves of a tree, and how to put others in their place (`rest`, if given, in that of all other leaves)."""
    leaves, structure = jax.tree.flatten(tree)
    indices = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, np.inexact)]

    def rebuild(differentiated: Sequence[Any], *rest: Any) -> Any:
        return structure.unflatten(replaced(rest * len(leaves) if rest else leaves, indices, differentiated))

    return [leaves[i] for i in indices], rebuild
