"""The solution of x = f(x, θ), differentiated without its iterates.

    F(x, θ) = f(x, θ) - x,   A = 1 - f_x,   Aᵀ λ = dx̄,   dθ̄ = f_θᵀ λ

The derivation is in `layers/implicit/rule.py`.

Saved     x and θ; of the iterates none.

Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019.
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

SOLVERS = {"anderson": Anderson(), "broyden": Broyden(), "iteration": Iteration(), "newton": Newton()}


class FixedPointFunction(ImplicitFunction):
    @staticmethod
    def example(key, dtype):
        def f(x, theta):
            w, u = theta
            return [0.5 * jnp.tanh(x[0] @ w + u)]

        keys = jax.random.split(key, 3)
        x0, u = (jax.random.normal(k, (2, 3), dtype) for k in keys[:2])
        w = jax.random.normal(keys[2], (3, 3), dtype) / 3
        linear = LinearSystem("FixedPointFunction", Iteration())
        return Equation("FixedPointFunction", f, True, Iteration(), linear), [x0], (w, u)

    @staticmethod
    def examples(key, dtype):
        equation, x0, (w, u) = FixedPointFunction.example(key, dtype)
        by_newton = equation.solved_by(Newton(), GMRES())
        strict = equation.solved_by(Newton(), GMRES(), tol=1e-12, max_steps=50, throw=True)
        return {
            "by Newton's method, strictly": (strict, x0, (w, u)),
            "far out": (by_newton, x0, (w, 1e4 * u)),
            "zeros": (by_newton, [0 * x0[0]], (0 * w, 0 * u)),
            "no rows": (by_newton, [x0[0][:0]], (w, u[:0])),
        }


def fixed_point(
    f: Callable[..., Any],
    x0: Any,
    *args: Any,
    solver: Any = "anderson",
    tol: float | None = None,
    max_steps: int = 100,
    backward: Any = "gmres",
    backward_tol: float | None = None,
    backward_steps: int | None = None,
    throw: bool = False,
) -> tuple[Any, Convergence]:
    """Solves x = f(x, *args) for x, differentiable in `args` and in all that `f` closes over, in memory that does not grow with the steps.

    The gradient is that of the solution, by the implicit function theorem, whatever the solver; that of `x0` is 0. Its linear system is solved
    to `backward_tol`, or else it is NaN. "neumann" and "one_step" are inexact on purpose: they give a few terms of a series, unchecked. Where
    the solve for x itself did not converge the gradient is the formula at the last x, and means little: look at `converged`.

    Args:
        f: a JAX function, an nnx module or a method of one; it may close over traced arrays and modules. It must be the same function at each
            call: the noise of a dropout is that of one draw, and updates of running statistics are lost. A module that f closes over must
            not change its state when called, as one with dropout does: give such a module in `args`, or as f itself.
        x0: where the solver starts: arrays or a pytree of arrays, of the shapes that f returns. Cast to the dtype that f returns.
        *args: further arguments of f: pytrees of arrays, nnx modules, any other objects.
        solver: "anderson", "broyden", "iteration" (x ← f(x)), "newton" (with GMRES), one of `Anderson(memory, mixing)`, `Broyden(memory)`,
            `Iteration()`, `Newton()`, or a solver object of optimistix.
        tol: the solver stops where rms(f(x) - x) ≤ tol (1 + rms(x)). By default eps^(3/4) of the dtype of x, 6e-6 for float32; in half precision
            2 eps, 0.002 for float16 and 0.016 for bfloat16.
        max_steps: the most steps of the solver.
        backward: how the linear system of the gradient is solved: "gmres", "anderson", "broyden", "iteration", "cg" (where 1 - f_x is symmetric
            and positive), "neumann", "one_step", one of the classes of these names, or a solver object of lineax.
        backward_tol: the residual of that, relative to its right-hand side. By default eps^(2/3): 2e-5 for float32, 0.04 for bfloat16.
        backward_steps: the most products of the Jacobian with a vector, by default 200; for "neumann" how many there are, by default 5.
        throw: raises where the solve, or the linear solve of its derivative, did not converge.

    Returns:
        `(x, convergence)`: the solution, and its `residual`, `iterations` and `converged`, arrays through which no gradient goes. Without
        `throw`, a solve that did not converge gives the last x and `converged` False.

    Raises:
        ValueError: where f changes the structure or shape of x, or an option is out of range. TypeError: where x0 or f is not of floating-point
            dtype. ConvergenceError: see `throw`; inside `jax.jit` it is the cause of a JaxRuntimeError.

    Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019; Blondel et al., "Efficient and Modular Implicit Differentiation", 2022.
    """
    return solve_fixed_point("fixed_point", f, x0, args, Choices(solver, tol, max_steps, backward, backward_tol, backward_steps, throw))


def solve_fixed_point(who: str, f: Callable[..., Any], x0: Any, args: tuple[Any, ...], given: Choices) -> tuple[Any, Convergence]:
    """`fixed_point` for `who`, which messages name."""
    options = read(who, SOLVERS, given, series=True)
    traced = trace_map(who, checks.function(who, "f", f), x0, args)
    return options.solve(FixedPointFunction, traced.call, traced, fixed=True)
