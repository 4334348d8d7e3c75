"""A deep equilibrium layer: the fixed point of another layer.

    z = layer(z, x)

One layer applied until nothing changes, with the gradient of the solution: `layers/implicit/fixed_point.py`.

Saved     z, x and the layer's parameters, whatever the number of steps.

Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.implicit.fixed_point import fixed_point


@dataclass(frozen=True)
class _Options:
    solver: Any
    tol: float | None
    max_steps: int
    backward: Any
    backward_tol: float | None
    backward_steps: int | None
    throw: bool


class DEQ(nnx.Module):
    """The fixed point of `layer(z, x)` in z, trained by the gradient of that.

    The convergence of each call is sown as an `nnx.Intermediate` named "convergence" (collect it by `nnx.capture`), and returned with
    `return_convergence=True`. Inside the layer dropout has one mask for all steps of a call, and another one for the next call; running
    statistics are not updated.

    Args:
        layer: an nnx module, or a function, `(z, x) -> z`.
        solver, tol, max_steps, backward, backward_tol, backward_steps, throw: as for `fixed_point`.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        *,
        solver: Any = "anderson",
        tol: float | None = None,
        max_steps: int = 100,
        backward: Any = "gmres",
        backward_tol: float | None = None,
        backward_steps: int | None = None,
        throw: bool = False,
    ):
        self.layer = layer
        self.options = _Options(solver, tol, max_steps, backward, backward_tol, backward_steps, throw)

    def __call__(self, x: Any, z0: Any = None, *, return_convergence: bool = False) -> Any:
        """The fixed point.

        Args:
            x: the second argument of the layer.
            z0: where the solver starts, of the shape of z; zeros of the shape of `x` by default.
            return_convergence: returns `(z, convergence)`.
        """
        z0 = jax.tree.map(jnp.zeros_like, x) if z0 is None else z0
        options = {key: getattr(self.options, key) for key in self.options.__dataclass_fields__}
        z, convergence = fixed_point(lambda z, layer, x: layer(z, x), z0, self.layer, x, **options)
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "convergence", convergence)
        _next_noise(self.layer)
        return (z, convergence) if return_convergence else z


def _next_noise(layer: Any) -> None:
    """Moves on every random stream that a dropout of the layer draws from, so that the next call has another mask."""
    if not isinstance(layer, nnx.Module):
        return
    for _, m in nnx.iter_graph(layer):
        if isinstance(m, nnx.Dropout) and m.rngs is not None and m.rate > 0 and not m.deterministic:
            m.rngs()
