"""The minimum of f(x, θ) over x, differentiated without its iterates.

    F = -∇f,   A = H, the Hessian of f in x,   H λ = dx̄,   dθ̄ = -(∂∇f / ∂θ)ᵀ λ

The derivation is in `layers/implicit/rule.py`. H is used through products with vectors only.

Saved     x and θ; of the iterates none.

Reference: Blondel et al., "Efficient and Modular Implicit Differentiation", 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import checks
from layers.implicit.krylov import CG
from layers.implicit.linear import LinearSystem
from layers.implicit.minimizers import LBFGS, NewtonCG
from layers.implicit.options import Choices, read
from layers.implicit.rule import Convergence, Equation, ImplicitFunction
from layers.implicit.solvers import Iteration
from layers.implicit.traced import trace_scalar

SOLVERS = {"newton": NewtonCG(), "lbfgs": LBFGS()}


class ArgminFunction(ImplicitFunction):
    @staticmethod
    def example(key, dtype):
        def objective(x, theta):
            w, u = theta
            return jnp.sum(x[0] ** 2 / 2 - u * x[0]) + jnp.sum(jnp.cos(x[0] @ w)) / 2

        keys = jax.random.split(key, 3)
        x0, u = (jax.random.normal(k, (2, 3), dtype) for k in keys[:2])
        w = jax.random.normal(keys[2], (3, 3), dtype) / 3
        linear = LinearSystem("ArgminFunction", Iteration())
        return Equation("ArgminFunction", jax.grad(objective), False, Iteration(), linear, objective=objective), [x0], (w, u)

    @staticmethod
    def examples(key, dtype):
        equation, x0, (w, u) = ArgminFunction.example(key, dtype)
        by_newton = equation.solved_by(NewtonCG(), CG())
        strict = equation.solved_by(NewtonCG(), CG(), tol=1e-12, max_steps=50, throw=True)
        return {
            "by Newton's method, strictly": (strict, x0, (w, u)),
            "zeros": (by_newton, [0 * x0[0]], (0 * w, 0 * u)),
            "no rows": (by_newton, [x0[0][:0]], (w, u[:0])),
        }


def argmin(
    f: Callable[..., Any],
    x0: Any,
    *args: Any,
    solver: Any = "newton",
    tol: float | None = None,
    max_steps: int = 100,
    backward: Any = "cg",
    backward_tol: float | None = None,
    backward_steps: int | None = None,
    throw: bool = False,
) -> tuple[Any, Convergence]:
    """Finds an x where f(x, *args) is least, differentiable in `args` and in all that `f` closes over, whatever the solver.

    The gradient is that of the minimum near which the solver stopped, which has to be a strict one; that of `x0` is 0. Its linear system is
    solved to `backward_tol`, or else it is NaN: so where the Hessian is singular, and with "cg" where it meets a direction that is not positive.
    Where the solve for x itself did not converge it is the formula at the last x, and means little: look at `converged`.

    Args:
        f: a JAX function that returns a real scalar and is twice differentiable in x. It may close over traced arrays and modules.
            A module that f closes over must not change its state when called, as one with dropout does: give such a module in `args`, or as f
            itself.
        x0: where the solver starts: real arrays or a pytree of them.
        *args: further arguments of f.
        solver: "newton" (with conjugate gradients) or "lbfgs", both with steps halved until f is finite and falls; one of `NewtonCG`, `LBFGS`,
            or a solver object of optimistix, a minimiser or a root finder.
        tol: the solver stops where rms(∇f(x)) ≤ tol (1 + rms(x)). By default eps^(3/4) of the dtype of x, 6e-6 for float32; in half precision
            2 eps, 0.002 for float16 and 0.016 for bfloat16.
        max_steps: the most steps of the solver.
        backward: how the linear system of the gradient is solved: "cg", "gmres", "anderson", "broyden", "iteration", one of the classes of
            these names, or a solver object of lineax.
        backward_tol: the residual of that, relative to its right-hand side. By default eps^(2/3): 2e-5 for float32, 0.04 for bfloat16.
        backward_steps: the most products of the Hessian with a vector, by default 200.
        throw: raises where the solve, or the linear solve of its derivative, did not converge.

    Returns:
        `(x, convergence)`, as `fixed_point` does. `converged` says that the gradient of f is small at x, not that x is a minimum: a saddle or a
            maximum passes as well.

    Raises:
        ValueError: where f is not a real scalar, or an option is out of range. TypeError: where x0 is not of floating-point dtype.
            ConvergenceError: see `throw`; inside `jax.jit` it is the cause of a JaxRuntimeError.

    Reference: Blondel et al., "Efficient and Modular Implicit Differentiation", 2022.
    """
    options = read("argmin", SOLVERS, Choices(solver, tol, max_steps, backward, backward_tol, backward_steps, throw))
    traced = trace_scalar("argmin", checks.function("argmin", "f", f), x0, args)
    if any(jnp.iscomplexobj(x) for x in traced.x):
        raise TypeError("argmin: x0 is complex, but must be real; minimise over its real and imaginary part")
    objective = lambda x, theta: traced.call(x, theta)[0]
    return options.solve(ArgminFunction, jax.grad(objective), traced, objective=objective)
