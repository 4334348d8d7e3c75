"""`barrier` for rules that hold a program traced for where its arrays are: it leaves every array there."""

from __future__ import annotations

from typing import Any

import jax

from layers.core import compat
from layers.core.recompute import barrier


def varying_barrier(residuals: Any, cotangents: Any) -> tuple[Any, Any]:
    """`barrier` for the arrays that vary over all the mesh axes that any of these varies over (`shard_map`); it would mark the others as such.

    What is computed from the others alone is the same in forward and backward, and XLA may merge it.
    """
    leaves, tree = jax.tree.flatten((residuals, cotangents))
    axes = [compat.varying_axes(jax.typeof(x)) for x in leaves]
    everywhere = frozenset().union(*axes)
    behind, _ = barrier([x for x, a in zip(leaves, axes, strict=True) if a == everywhere], ())
    given = iter(behind)
    return tree.unflatten([next(given) if a == everywhere else x for x, a in zip(leaves, axes, strict=True)])
