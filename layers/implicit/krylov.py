"""GMRES and conjugate gradients for A x = b on vectors of any shape.

GMRES keeps an orthonormal basis of b, Ab, A²b, ... and takes the x in it whose residual is least. The Hessenberg matrix of the basis is made
triangular by rotations, whose product Q also tells the residual: |Q[j+1, 0]| times that of the start.

References: Saad and Schultz, "GMRES", 1986; Hestenes and Stiefel, "Methods of Conjugate Gradients", 1952.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.lengths import length, power_of_two
from layers.core.products import einsum
from layers.implicit import vectors as v
from layers.implicit.vectors import Map, Vector


class LinearSolved(NamedTuple):
    """Where a solver stopped, the root mean square of b - A x there, and how often it applied A."""

    x: Vector
    residual: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class GMRES:
    """GMRES, started again after `restart` steps. Holds restart + 4 vectors.

    Attributes:
        restart: None for 20 and, where these do not suffice, the dimension of the system; but 100 at most, and fewer where so many vectors
            would be more than 65536 numbers, down to 20.
    """

    restart: int | None = None

    def solve(self, a: Map, b: Vector, tol: Any, max_steps: int) -> LinearSolved:
        def cycle(carry: Any, m: int) -> Any:
            x, r, _, steps = carry
            x, used = self._cycle(a, x, r, tol, m, max_steps - steps)
            r = v.minus(b, a(x))
            return x, r, v.rms(r), steps + used + 1

        *once, last = self._restarts(v.size(b), v.size(b) * (2 if any(jnp.iscomplexobj(x) for x in b) else 1))
        carry = (v.times(0, b), b, v.rms(b), jnp.zeros((), jnp.int32))
        for m in once:
            carry = v.while_loop(lambda c: (c[2] > tol) & (c[3] == 0), partial(cycle, m=m), carry)
        x, _, residual, steps = v.while_loop(lambda c: (c[2] > tol) & (c[3] < max_steps), partial(cycle, m=last), carry)
        return LinearSolved(x, residual, steps)

    def _restarts(self, size: int, dimension: int) -> list[int]:
        """The steps of the first cycle, if it is another than those after it, and of all after it."""
        if self.restart is not None:
            return [min(self.restart, dimension)]
        most = min(max(20, min(100, 2**16 // size)), dimension)
        return [20, most] if most > 20 else [most]

    @staticmethod
    def _cycle(a: Map, x: Vector, r: Vector, tol: Any, m: int, most: Any) -> tuple[Vector, Any]:
        dtype, root = v.real_dtype(r), v.size(r) ** 0.5
        start = v.rms(r) * root

        def step(carry: Any) -> Any:
            basis, triangle, q, j, _ = carry
            w = a(v.take(basis, j))
            first = (jnp.zeros((), jnp.int32), w, jnp.zeros(m + 1, dtype))
            _, w, h = v.while_loop(lambda c: c[0] <= j, lambda c: _without(basis, *c), first)
            norm = length(w)
            basis = v.put(basis, j + 1, v.times(1 / jnp.where(norm > 0, norm, 1), w))
            column = einsum("ij,j->i", q, h.at[j + 1].set(norm))
            along, below = column[j], column[j + 1]
            hypotenuse = jnp.hypot(along, below)
            c, s = (jnp.where(hypotenuse > 0, z / jnp.where(hypotenuse > 0, hypotenuse, 1), o) for z, o in ((along, 1.0), (below, 0.0)))
            q = q.at[jnp.stack([j, j + 1])].set(jnp.stack([c * q[j] + s * q[j + 1], c * q[j + 1] - s * q[j]]))
            triangle = triangle.at[:, j].set(jnp.where(jnp.arange(m) < j, column[:m], 0).at[j].set(hypotenuse))
            return basis, triangle, q, j + 1, start * jnp.abs(q[j + 1, 0]) / root

        basis = v.put(v.stack_of_zeros(m + 1, r), 0, v.times(1 / jnp.where(start > 0, start, 1), r))
        carry = (basis, jnp.zeros((m, m), dtype), jnp.eye(m + 1, dtype=dtype), jnp.zeros((), jnp.int32), start / root)
        go_on = lambda c: (c[3] < jnp.minimum(m, most)) & (c[4] > tol)
        basis, triangle, q, used, _ = v.while_loop(go_on, step, carry)
        unused = jnp.diagonal(triangle) == 0
        weights = jax.scipy.linalg.solve_triangular(triangle + jnp.diag(unused.astype(dtype)), jnp.where(unused, 0, start * q[:m, 0]))
        return v.plus(x, v.combine(jnp.append(weights, jnp.zeros((), dtype)), basis)), used


def _without(basis: Vector, i: Any, w: Vector, h: jax.Array) -> tuple[Any, Vector, jax.Array]:
    """`w` without its part along vector i of the basis, that part written to `h`, and the next i."""
    along = v.dot(v.take(basis, i), w)
    return i + 1, v.plus(w, v.take(basis, i), -along), h.at[i].set(along)


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, for symmetric positive definite A; stops where it meets a direction along which A is not positive. Holds 4 vectors."""

    def solve(self, a: Map, b: Vector, tol: Any, max_steps: int) -> LinearSolved:
        def body(carry: Any) -> Any:
            x, r, p, square, _, steps = carry
            ap = a(p)
            curvature = v.dot(p, ap)
            positive = curvature > 0
            rate = jnp.where(positive, square / jnp.where(positive, curvature, 1), 0)
            x, r = v.plus(x, p, rate), v.plus(r, ap, -rate)
            following = v.dot(r, r)
            p = v.plus(r, p, following / jnp.where(square > 0, square, 1))
            return x, r, p, following, positive, steps + 1

        square = v.dot(b, b)
        start = (v.times(0, b), b, b, square, square >= 0, jnp.zeros((), jnp.int32))
        go_on = lambda c: (jnp.sqrt(c[3] / v.size(b)) > tol) & c[4] & (c[5] < max_steps)
        x, _, _, square, _, steps = v.while_loop(go_on, body, start)
        return LinearSolved(x, jnp.sqrt(square / v.size(b)), steps)


def solve_relative(method: Any, a: Map, b: Vector, tol: float, max_steps: int) -> Vector:
    """An x with |b - A x| ≤ tol |b|. The method sees b divided by a power of two, so that it can square any finite one."""
    size = v.rms(b)
    scale = power_of_two(size)
    return v.times(scale, method.solve(a, v.times(1 / scale, b), tol * (size / scale), max_steps).x)
