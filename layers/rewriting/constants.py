"""What is known of values while a function is rewritten: those that depend on no argument are computed then, where a pattern asks.

So a mask is an array here, whatever formula made it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from layers.core import compat
from layers.rewriting.folding import fold
from layers.rewriting.graph import Value
from layers.rewriting.primitives import CASTS, FOLDABLE, LAYOUT

LIMIT = 1 << 26
"""Of the elements of an array that is computed."""


def is_static(v: Value) -> bool:
    """Whether the value depends on no argument."""
    if v._static is None:
        v._static = v.const is not None or (
            v.node is not None and v.node.name in FOLDABLE and v.size <= LIMIT and all(x.size <= LIMIT and is_static(x) for x in v.node.inputs)
        )
    return v._static


def array_of(v: Value) -> np.ndarray | None:
    """The value, or None where it is not known."""
    if v.const is not None:
        hidden = isinstance(v.const, compat.Tracer) or compat.is_key(v.aval) or not getattr(v.const, "is_fully_addressable", True)
        return None if hidden else np.asarray(v.const, v.dtype)
    if not is_static(v) or v.node is None:
        return None
    args = [a for x in v.node.inputs if (a := array_of(x)) is not None]
    if len(args) < len(v.node.inputs):
        return None
    for o, x in zip(v.node.outputs, fold(v.node, args), strict=True):
        o.const = x
    return v.const


def number_of(v: Value) -> Any:
    """The number that all elements are, or None."""
    while v.const is None and v.node is not None and v.node.name in LAYOUT | CASTS:
        v = v.node.inputs[0]
    if v.size > 4096 or compat.is_key(v.aval) or (x := array_of(v)) is None or not x.size or x.dtype.kind == "c":
        return None
    x = x.ravel()
    return x[0].item() if (x == x[0]).all() else None
