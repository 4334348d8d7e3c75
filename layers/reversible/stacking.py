"""Modules that are alike, as one module whose variables have an axis for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.core import compat
from layers.core.trees import is_inexact


def stacked(modules: Sequence[nnx.Module]) -> nnx.Module:
    """One module with the variables of all along a first axis.

    A random stream that the modules share becomes one stream each.

    Raises:
        ValueError: where they differ in structure or shapes, or share a parameter.
    """
    graphs, states = zip(*[nnx.split(m) for m in modules], strict=True)
    for i, (graph, state) in enumerate(zip(graphs, states, strict=True)):
        if graph != graphs[0] or jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, states[0]):
            raise ValueError(f"ReversibleStack: scan=True needs blocks that are alike, but block {i} is built otherwise than block 0: use scan=False")
    owners = [{path: id(v) for path, v in nnx.iter_graph(m) if isinstance(v, nnx.Variable)} for m in modules]
    leaves = [nnx.to_flat_state(s) for s in states]
    columns = []
    for k, (path, leaf) in enumerate(leaves[0]):
        shared = len(modules) > 1 and len({o.get(path) for o in owners}) < len(modules) and isinstance(leaf, nnx.Variable)
        columns.append(_column([_value(flat[k][1]) for flat in leaves], shared, path))
    return nnx.merge(graphs[0], jax.tree.unflatten(jax.tree.structure(states[0]), columns))


def _column(values: list[Any], shared: bool, path: Any) -> Any:
    if shared and compat.is_key(values[0]):
        values = [jax.random.fold_in(v, i) for i, v in enumerate(values)]
    elif shared and is_inexact(values[0]):
        raise ValueError(f"ReversibleStack: blocks share the variable {'.'.join(map(str, path))}, which cannot be stacked: use scan=False")
    return jnp.stack(values)


def _value(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
