"""The linear systems A x = b of implicit differentiation: exact to a tolerance, or on purpose a few terms of a series.

A linear solve that misses its tolerance gives NaN; with `throw=True` it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from layers.core import compat
from layers.core.lengths import power_of_two
from layers.implicit import vectors as v
from layers.implicit.failure import raise_unless
from layers.implicit.krylov import CG, GMRES, LinearSolved
from layers.implicit.solvers import Anderson, Broyden, Iteration, System
from layers.implicit.vectors import Map, Vector


@dataclass(frozen=True)
class Neumann:
    """The first terms of A⁻¹ = Σ (1 - A)ⁱ: `steps` products, and an error of the order of |1 - A|^(steps + 1).

    Reference: Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", 2020.
    """

    steps: int = 5

    def series(self, complement: Map, b: Vector) -> Vector:
        return lax.scan(lambda x, _: (v.plus(b, complement(x)), None), b, None, length=self.steps)[0]


@dataclass(frozen=True)
class OneStep:
    """A⁻¹ taken as 1: the gradient through one application of f.

    Reference: Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", 2022.
    """

    def series(self, complement: Map, b: Vector) -> Vector:
        return b


@dataclass(frozen=True)
class LinearSystem:
    """How the linear systems of a derivative are solved.

    Attributes:
        name: of the layer, for messages.
        method: a solver with `solve(a, b, tol, max_steps)` or `solve(system, x)`, or a series with `series(1 - a, b)`.
        tol: the bound of |b - A x| / |b|; None for eps^(2/3) of the dtype of the solution.
        max_steps: the most products with A.
        throw: whether missing `tol` raises.
    """

    name: str
    method: Any
    tol: float | None = None
    max_steps: int = 200
    throw: bool = False

    def solve(self, a: Map, b: Vector, dtypes: Sequence[Any], complement: Map | None = None) -> Vector:
        """A⁻¹ b, differentiable in both. `dtypes` are those of the solution outside; `complement` is 1 - A, where that is had without A."""
        if hasattr(self.method, "series"):
            return self.method.series(complement or _complement(a), b)
        tol = _epsilon(dtypes) ** (2 / 3) if self.tol is None else self.tol

        def solve(complement: Map, a: Map, b: Vector) -> Vector:
            scale = power_of_two(v.rms(b))
            x, residual, steps = self._unit(a, complement, v.times(1 / scale, b), tol)
            solved = residual <= tol
            if self.throw:
                what = f"{self.name}: the linear solve of its derivative did not converge"
                x = raise_unless(solved, x, what, _advice(self.method), tol, residual, steps)
            return v.choose(solved, v.times(scale, x), [jnp.full_like(y, jnp.nan) for y in x])

        given = complement or _complement(a)
        if compat.varies(b):
            # JAX 0.12 lowers custom_linear_solve without the mesh axes that its operands vary over, and fails
            return solve(given, a, compat.vary_like(b, a))
        return lax.custom_linear_solve(a, b, lambda a, b: solve(given, a, b), transpose_solve=lambda a, b: solve(_complement(a), a, b))

    def _unit(self, a: Map, complement: Map, b: Vector, tol: float) -> LinearSolved:
        """For b of a root mean square from 1 to 2, or 0."""
        if isinstance(self.method, Iteration):
            return _sum_of_powers(complement, b, tol, self.max_steps)
        if isinstance(self.method, (Anderson, Broyden)):
            system = System(lambda x: v.minus(b, a(x)), lambda _, r: v.rms(r), tol, self.max_steps)
            return LinearSolved(*self.method.solve(system, b))
        return self.method.solve(a, b, tol, self.max_steps)


def _advice(method: Any) -> str:
    other = "keep more vectors, backward=GMRES(restart=...)" if isinstance(method, GMRES) else "take another method, such as backward='gmres'"
    return f"Allow more steps, backward_steps=..., or a larger residual, backward_tol=...; {other}"


def _complement(a: Map) -> Map:
    return lambda x: v.minus(x, a(x))


def _sum_of_powers(complement: Map, b: Vector, tol: Any, max_steps: int) -> LinearSolved:
    """x ← b + (1 - A) x from x = b: x grows by the powers of 1 - A times b, and the next one is its residual. Holds two vectors."""

    def body(carry: Any) -> Any:
        x, power, _, steps = carry
        power = complement(power)
        return v.plus(x, power), power, v.rms(power), steps + 1

    start = (b, b, jnp.full((), jnp.inf, v.real_dtype(b)), jnp.zeros((), jnp.int32))
    x, _, residual, steps = v.while_loop(lambda c: (c[2] > tol) & (c[3] < max_steps), body, start)
    return LinearSolved(x, residual, steps)


METHODS: dict[str, Any] = {
    "gmres": GMRES(),
    "cg": CG(),
    "iteration": Iteration(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "neumann": Neumann(),
    "one_step": OneStep(),
}


def default_tolerance(dtypes: Sequence[Any]) -> float:
    """The machine epsilon of the coarsest of the dtypes to the power 3/4; in half precision, where that is too lax, twice the epsilon.

    1.8e-12 for float64, 6e-6 for float32, 0.002 for float16, 0.016 for bfloat16.
    """
    eps = _epsilon(dtypes)
    return 2 * eps if eps > 1e-4 else eps ** (3 / 4)


def _epsilon(dtypes: Sequence[Any]) -> float:
    return max((float(jnp.finfo(d).eps) for d in dtypes), default=float(jnp.finfo(jnp.float32).eps))
