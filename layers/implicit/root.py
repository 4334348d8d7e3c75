"""The solution of f(x, θ) = 0, differentiated without its iterates.

    F = -f,   A = f_x,   Aᵀ λ = dx̄,   dθ̄ = -f_θᵀ λ

The derivation is in `layers/implicit/rule.py`.

Saved     x and θ; of the iterates none.

Reference: Blondel et al., "Efficient and Modular Implicit Differentiation", 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.implicit.krylov import GMRES
from layers.implicit.linear import LinearSystem
from layers.implicit.options import Choices, read
from layers.implicit.rule import Convergence, Equation, ImplicitFunction
from layers.implicit.solvers import Anderson, Broyden, Iteration, Newton
from layers.implicit.traced import trace_map

SOLVERS = {"newton": Newton(), "broyden": Broyden(), "anderson": Anderson(), "iteration": Iteration()}


class RootFunction(ImplicitFunction):
    @staticmethod
    def example(key, dtype):
        def f(x, theta):
            w, u = theta
            return [x[0] + 0.5 * jnp.sin(x[0] @ w) - u]

        keys = jax.random.split(key, 3)
        x0, u = (jax.random.normal(k, (2, 3), dtype) for k in keys[:2])
        w = jax.random.normal(keys[2], (3, 3), dtype) / 3
        linear = LinearSystem("RootFunction", Iteration())
        return Equation("RootFunction", f, False, Iteration(), linear), [x0], (w, u)

    @staticmethod
    def examples(key, dtype):
        equation, x0, (w, u) = RootFunction.example(key, dtype)
        by_newton = equation.solved_by(Newton(), GMRES())
        strict = equation.solved_by(Newton(), GMRES(), tol=1e-12, max_steps=50, throw=True)
        return {
            "by Newton's method, strictly": (strict, x0, (w, u)),
            "zeros": (by_newton, [0 * x0[0]], (0 * w, 0 * u)),
            "no rows": (by_newton, [x0[0][:0]], (w, u[:0])),
        }


def root(
    f: Callable[..., Any],
    x0: Any,
    *args: Any,
    solver: Any = "newton",
    tol: float | None = None,
    max_steps: int = 100,
    backward: Any = "gmres",
    backward_tol: float | None = None,
    backward_steps: int | None = None,
    throw: bool = False,
) -> tuple[Any, Convergence]:
    """Solves f(x, *args) = 0 for x, differentiable in `args` and in all that `f` closes over, whatever the solver.

    The gradient is that of the root near which the solver stopped; that of `x0` is 0. Its linear system is solved to `backward_tol`, or else it
    is NaN. Where the solve for x itself did not converge it is the formula at the last x, and means little: look at `converged`.

    Args:
        f: a JAX function with as many equations as unknowns: what it returns has the structure and shapes of x. It may close over traced
            arrays and modules. A module that f closes over must not change its state when called, as one with dropout does: give such
            a module in `args`, or as f itself.
        x0: where the solver starts: arrays or a pytree of arrays. Cast to the dtype that f returns.
        *args: further arguments of f.
        solver: "newton" (with GMRES, halving steps that do not help), "broyden", "anderson" and "iteration" (x ← x - f(x), for Jacobians near 1),
            one of `Newton`, `Broyden`, `Anderson`, `Iteration`, or a solver object of optimistix. Newton's steps are exact up to 100 unknowns;
            a larger system that is far from the identity may need `Newton(restart=..., linear_steps=...)`.
        tol: the solver stops where rms(f(x)) ≤ tol (1 + rms(x)). By default eps^(3/4) of the dtype of x, 6e-6 for float32; in half precision
            2 eps, 0.002 for float16 and 0.016 for bfloat16.
        max_steps: the most steps of the solver.
        backward: how the linear system of the gradient is solved: "gmres", "cg" (for a symmetric positive Jacobian), "anderson", "broyden",
            "iteration", one of the classes of these names, or a solver object of lineax. GMRES is exact up to 100 unknowns, then see
            `GMRES(restart=...)`.
        backward_tol: the residual of that, relative to its right-hand side. By default eps^(2/3): 2e-5 for float32, 0.04 for bfloat16.
        backward_steps: the most products of the Jacobian with a vector, by default 200.
        throw: raises where the solve, or the linear solve of its derivative, did not converge.

    Returns:
        `(x, convergence)`, as `fixed_point` does.

    Raises:
        ValueError: where f changes the structure or shape of x, or an option is out of range. TypeError: where x0 or f is not of floating-point
            dtype. ConvergenceError: see `throw`; inside `jax.jit` it is the cause of a JaxRuntimeError.

    Reference: Blondel et al., "Efficient and Modular Implicit Differentiation", 2022.
    """
    options = read("root", SOLVERS, Choices(solver, tol, max_steps, backward, backward_tol, backward_steps, throw))
    traced = trace_map("root", checks.function("root", "f", f), x0, args)
    return options.solve(RootFunction, traced.call, traced)
