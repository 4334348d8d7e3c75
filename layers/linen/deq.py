"""The deep equilibrium layer of a Linen module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from layers.implicit.deq import DEQ as _DEQ
from layers.linen.apart import Apart


class DEQ(linen.Module):
    """The fixed point of `layer(z, x)` in z, trained by the gradient of that: `layers.DEQ` of a Linen module.

    The convergence of each call is sown in "intermediates" under the name "convergence". Whatever the layer draws at random is the same for all
    steps of a call; its other collections, running statistics for one, are read and not updated.

    Attributes:
        layer: a Linen module, whose parameters are under `layer`, or a function, which may use Linen modules that write nothing; `(z, x) -> z`.
        solver, tol, max_steps, backward, backward_tol, backward_steps, throw: as for `layers.fixed_point`.
    """

    layer: Callable[..., Any]
    _: KW_ONLY
    solver: Any = "anderson"
    tol: float | None = None
    max_steps: int = 100
    backward: Any = "gmres"
    backward_tol: float | None = None
    backward_steps: int | None = None
    throw: bool = False

    def __call__(self, x: Any, z0: Any = None, *, return_convergence: bool = False) -> Any:
        """The fixed point: arguments and result as of `layers.DEQ`."""
        layer, z0 = self.layer, jax.tree.map(jnp.zeros_like, x) if z0 is None else z0
        if self.is_initializing():
            layer(z0, x)
        if isinstance(layer, linen.Module):
            layer = Apart("DEQ", layer)
        names = ("solver", "tol", "max_steps", "backward", "backward_tol", "backward_steps", "throw")
        before = self._mutable()
        z, convergence = _DEQ(layer, **{n: getattr(self, n) for n in names})(x, z0, return_convergence=True)
        after = self._mutable()
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            raise TypeError("DEQ: layer is a function that calls a Linen module which writes variables: give a module that holds it as `layer`")
        self.sow("intermediates", "convergence", convergence)
        return (z, convergence) if return_convergence else z

    @linen.nowrap
    def _mutable(self) -> list[Any]:
        """All variables that may be written now, wherever they belong."""
        scope: Any = self.scope
        return jax.tree.leaves(scope.root.mutable_variables())
