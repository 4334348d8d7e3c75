"""Rows of the benchmark: fixed points."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layers.implicit.fixed_point import fixed_point
from layers.tools.cases.case import Case

STEPS = 11


def _args() -> tuple[Any, ...]:
    """A weight that contracts by about 0.45, and the input of 1024 rows."""
    kw, kx = jax.random.split(jax.random.key(0))
    return 0.45 * jax.random.normal(kw, (512, 512)) / (2 * 512**0.5), jax.random.normal(kx, (1024, 512))


def _unrolled(w: Any, x: Any) -> Any:
    return jax.lax.scan(lambda z, _: (jnp.tanh(z @ w + x), None), jnp.zeros_like(x), None, length=STEPS)[0]


def _python_loop(w: Any, x: Any) -> Any:
    z = jnp.zeros_like(x)
    for _ in range(STEPS):
        z = jnp.tanh(z @ w + x)
    return z


def _implicit(**options: Any) -> Any:
    def solve(w: Any, x: Any) -> Any:
        return fixed_point(lambda z, w, x: jnp.tanh(z @ w + x), jnp.zeros_like(x), w, x, max_steps=STEPS, backward_steps=STEPS, **options)[0]

    return solve


CASES = (
    Case(
        "fixed_point",
        f"z = tanh(z w + x), 1024 x 512, {STEPS} steps forward, as many at most backward",
        _args,
        _unrolled,
        _implicit(solver="iteration", backward="iteration", tol=0.0, backward_tol=1e-6),
        flops=2.0 * (2 * STEPS + 1) * 1024 * 512 * 512,
        others=(
            ("Python loop", _python_loop),
            ("GMRES", _implicit(solver="iteration", tol=0.0)),
        ),
    ),
)
