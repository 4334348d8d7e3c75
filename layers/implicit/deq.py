"""A deep equilibrium layer: the fixed point of another layer.

    z = layer(z, x)

One layer applied until nothing changes, with the gradient of the solution: `layers/implicit/fixed_point.py`.

Saved     z, x and the layer's parameters, whatever the number of steps.

Reference: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.core import checks
from layers.core.trees import is_array
from layers.implicit.fixed_point import SOLVERS, solve_fixed_point
from layers.implicit.options import Choices, read


class DEQ(nnx.Module):
    """A deep equilibrium model: applies `layer(z, x)` to z again and again until z no longer changes, and is trained by the gradient of that z alone.

    A solve that did not converge is silent: it gives the last z, and as gradient the formula there. It becomes visible by
    `return_convergence=True`, by `nnx.capture` (the convergence of each call is sown as an `nnx.Intermediate` named "convergence") and by
    `throw=True`, which raises. In training, return `convergence.converged` with the loss.

    Whatever the layer draws from its random streams, a dropout's mask for one, is the same for all steps of a call, and other for the next
    call; running statistics are not updated.

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
        self.layer = checks.function("DEQ", "layer", layer)
        self.options = Choices(solver, tol, max_steps, backward, backward_tol, backward_steps, throw)
        read("DEQ", SOLVERS, self.options, series=True)

    def __call__(self, x: Any, z0: Any = None, *, return_convergence: bool = False) -> Any:
        """The fixed point.

        Args:
            x: the second argument of the layer.
            z0: where the solver starts, of the shape of z; zeros of the shape of `x` by default.
            return_convergence: returns `(z, convergence)`.
        """
        return_convergence = checks.flag("DEQ", "return_convergence", return_convergence)
        _check_arrays(*(("x", x) if z0 is None else ("z0", z0)))
        z0 = jax.tree.map(jnp.zeros_like, x) if z0 is None else z0
        drawn: set[int] = set()

        def f(z: Any, layer: Any, x: Any) -> Any:
            streams = _streams(layer)
            before = [m.count.get_value() for m in streams]
            out = _called(layer, z, x)
            drawn.update(i for i, (m, count) in enumerate(zip(streams, before, strict=True)) if m.count.get_value() is not count)
            return out

        z, convergence = solve_fixed_point("DEQ", f, z0, (self.layer, x), self.options)
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "convergence", convergence)
        for stream in {id(m): m for i, m in enumerate(_streams(self.layer)) if i in drawn}.values():
            stream()  # the layer drew in a copy: move on, so that the next call has other noise
        return (z, convergence) if return_convergence else z


def _check_arrays(what: str, tree: Any) -> None:
    leaves = jax.tree.leaves(tree)
    if not leaves or not all(is_array(leaf) or isinstance(leaf, (float, complex)) for leaf in leaves):
        raise TypeError(f"DEQ: {what} is {checks.shown(tree)}, but must be an array or a pytree of arrays")
    if what == "z0":
        for leaf in leaves:
            checks.array("DEQ", what, leaf, "inexact")


def _called(layer: Callable[..., Any], z: Any, x: Any) -> Any:
    """What the layer returns; where it refuses its arguments, an error that says what these were."""
    try:
        return layer(z, x)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        shapes = ", ".join(f"{name} of {jax.tree.map(jnp.shape, tree)}" for name, tree in (("z", z), ("x", x)))
        raise type(error)(f"DEQ: layer fails for {shapes}: {error}") from error


def _streams(layer: Any) -> list[nnx.RngStream]:
    """The random streams of a layer, in the order of its leaves, which is that of a copy too; one that has two places comes twice."""
    is_stream = lambda m: isinstance(m, nnx.RngStream)
    return [m for m in jax.tree.leaves(layer, is_leaf=is_stream) if is_stream(m)]
