"""Keeps what `backward` recomputes from being merged by XLA with the forward pass.

Where forward and backward are compiled together, common-subexpression elimination finds that a recomputed value stands there already, and
keeps it alive: the memory that the rule saves is lost. A barrier on what the recomputation starts from, tied to the incoming gradient,
stops this for elementwise operations; a matrix product needs a loop around it as well (`core/blocks.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax

from layers.core import compat
from layers.core.trees import replaced

_transposing = False


def is_transposing() -> bool:
    """Whether a backward rule is being traced in order to transpose it."""
    return _transposing


def barrier(residuals: Any, cotangents: Any) -> tuple[Any, Any]:
    """Both pytrees unchanged, but not available to XLA before `cotangents` is.

    To be called first in a `backward` that recomputes: `(x, w), dy = barrier((x, w), dy)`.

    Under `shard_map` every array goes on varying over the mesh axes that it varied over. Where JAX's own barrier does not see to that, an array
    that is the same on devices where the gradient differs passes by, and what is computed of such arrays alone XLA may merge.
    """
    if _transposing:
        return residuals, cotangents
    behind = lax.optimization_barrier((residuals, cotangents))
    leaves, tree = jax.tree.flatten((residuals, cotangents))
    axes = [_axes(x) for x in leaves]
    if axes == [_axes(x) for x in jax.tree.leaves(behind)]:
        return behind
    given = jax.tree.leaves(cotangents)
    least = frozenset().union(*map(_axes, given))
    for same in {a: None for a in axes if a >= least}:
        indices = [i for i, a in enumerate(axes) if a == same]
        behind, _ = lax.optimization_barrier(([leaves[i] for i in indices], [x for x in given if _axes(x) != same]))
        leaves = replaced(leaves, indices, behind)
    return tree.unflatten(leaves)


def _axes(x: Any) -> frozenset[str]:
    return compat.varying_axes(jax.typeof(x))


@contextlib.contextmanager
def no_barriers() -> Iterator[None]:
    """Traces a backward rule in order to transpose it: there residuals must not depend on the gradient."""
    global _transposing
    before, _transposing = _transposing, True
    try:
        yield
    finally:
        _transposing = before
