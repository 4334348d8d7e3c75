"""What is read of a softmax over classes: one class of each row, by index or one-hot, or a weighted sum of all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.rewriting.constants import array_of, is_static, number_of
from layers.rewriting.graph import Node, Value
from layers.rewriting.primitives import LAYOUT

NO_CLASS = np.iinfo(np.int32).min
"""An `ignore_index` that no label is."""


@dataclass(frozen=True)
class Labels:
    """The class of each row.

    Attributes:
        value: integers, of the shape of the rows but for axes of length 1.
        outside: what a label that is no class gives: "nan", "clipped" (the nearest class), "nothing" (0).
    """

    value: Value
    outside: str

    def prepared(self, labels: Any, rows: tuple[int, ...], vocab: int) -> Any:
        """As the losses take them, with `ignore_index=NO_CLASS`."""
        labels = labels.reshape(rows).astype(jnp.int32)
        if self.outside == "clipped":
            return jnp.clip(labels, 0, vocab - 1)
        return jnp.where((labels >= 0) & (labels < vocab), labels, NO_CLASS) if self.outside == "nothing" else labels


def gathered(n: Node, z: Value, nodes: set[Node]) -> Labels | None:
    """The labels where `n` takes one element of the last axis of `z` for each row."""
    if n.name != "gather" or n.inputs[0] is not z:
        return None
    d, last, index = n.params["dimension_numbers"], z.ndim - 1, n.inputs[1]
    if tuple(n.params["slice_sizes"]) != (1,) * z.ndim or _fills_with_a_number(n):
        return None
    outside = "clipped" if "CLIP" in str(n.params["mode"]).upper() else "nan"
    batch = tuple(range(last))
    along = tuple(d.operand_batching_dims)
    if tuple(d.start_index_map) == tuple(d.collapsed_slice_dims) == (last,) and all(i in along or z.shape[i] == 1 for i in batch):
        places = tuple(d.start_indices_batching_dims)
        if (places, along) != (tuple(sorted(places)), tuple(sorted(along))) or index.size != math.prod(z.shape[:-1]):
            return None
        nodes.add(n)
        return Labels(index, outside)
    if (
        tuple(d.start_index_map) == tuple(range(z.ndim))
        and not along
        and not d.offset_dims
        and index.node is not None
        and index.node.name == "concatenate"
    ):
        *parts, classes = index.node.inputs
        if len(parts) != last or any(x.shape != (*z.shape[:-1], 1) for x in index.node.inputs) or not all(map(_counts_rows, parts, batch)):
            return None
        nodes |= {n, index.node}
        return Labels(classes, outside)
    return None


def _fills_with_a_number(n: Node) -> bool:
    fill = n.params["fill_value"]
    return "FILL" in str(n.params["mode"]).upper() and fill is not None and not math.isnan(fill)


def _counts_rows(index: Value, axis: int) -> bool:
    """Whether an index is 0, 1, 2 ... along that axis."""
    known = array_of(index) if is_static(index) else None
    grid = np.arange(index.shape[axis]).reshape([-1 if i == axis else 1 for i in range(index.ndim)])
    return known is not None and bool((known == grid).all())


def takes_all(n: Node) -> bool:
    """Whether a gather takes all of its operand, and so only drops axes of length 1."""
    x = n.inputs[0]
    return n.name == "gather" and tuple(n.params["slice_sizes"]) == x.shape and n.out.size == x.size and number_of(n.inputs[1]) == 0


def hot_labels(v: Value, shape: tuple[int, ...]) -> Labels | None:
    """The labels of which `v`, booleans of that shape, is the one-hot form."""
    chain = []
    while v.node is not None and v.node.name in LAYOUT and v.node.inputs[0].size == v.size:
        chain.append(v.node)
        v = v.node.inputs[0]
    n = v.node
    if n is None or n.name != "eq" or any(c.name == "transpose" for c in chain):
        return None
    for a, b in (n.inputs, n.inputs[::-1]):
        if _counts_classes(b, v.shape) and v.shape[-1] == shape[-1]:
            labels = _once_a_row(a, v.shape)
            if labels is not None and math.prod(v.shape[:-1]) == math.prod(shape[:-1]):
                return Labels(labels, "nothing")
    return None


def _counts_classes(v: Value, shape: tuple[int, ...]) -> bool:
    """Whether `v` is 0, 1, 2 ... along the last axis of `shape`, and the same along the others."""
    while v.node is not None and v.node.name == "broadcast_in_dim" and _long_axes(v.node) == [v.ndim - 1]:
        v = v.node.inputs[0]
    known = array_of(v) if v.size == shape[-1] and v.shape[-1:] == shape[-1:] and is_static(v) else None
    return known is not None and bool((known.ravel() == np.arange(shape[-1])).all())


def _once_a_row(v: Value, shape: tuple[int, ...]) -> Value | None:
    """The integers that `v` repeats along the last axis of `shape`."""
    if v.shape == (*shape[:-1], 1):
        return v
    n = v.node
    if n is None or n.name != "broadcast_in_dim" or v.shape != shape or len(shape) - 1 in _long_axes(n):
        return None
    x = n.inputs[0]
    return x if x.size == math.prod(shape[:-1]) else None


def _long_axes(n: Node) -> list[int]:
    """The axes of a broadcast that come from an axis of the operand longer than 1."""
    return [j for i, j in enumerate(n.params["broadcast_dimensions"]) if n.inputs[0].shape[i] != 1]
