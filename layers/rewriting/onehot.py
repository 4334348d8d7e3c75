"""Functions of a one-hot array: which number they are at the label of a row, and which elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from layers.core import compat
from layers.rewriting.constants import number_of
from layers.rewriting.graph import Value, is_float
from layers.rewriting.labels import Labels

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative}


class Hot(NamedTuple):
    """`elsewhere` + `at_label` at the label of each row."""

    labels: Labels
    at_label: float
    elsewhere: float


def of_one_hot(v: Value, read: Callable[[Value], Labels | None]) -> Hot | None:
    """What `v` is as a function of a one-hot array, whose labels `read` finds; or None."""
    found: list[Labels] = []
    pair = _pair(v, read, found, 0)
    if pair is None or not found or any(x != found[0] for x in found):
        return None
    off, on = pair
    return Hot(found[0], on - off, off)


def _pair(v: Value, read: Callable[[Value], Labels | None], found: list[Labels], depth: int) -> tuple[float, float] | None:
    """The values where the one-hot array is 0 and where it is 1."""
    if (number := number_of(v)) is not None:
        return float(number), float(number)
    n = v.node
    if n is None or depth > 12:
        return None
    if not is_float(v) and v.dtype == np.bool_:
        labels = read(v)
        if labels is not None:
            found.append(labels)
        return None if labels is None else (0.0, 1.0)
    if n.name == "convert_element_type":
        return _pair(n.inputs[0], read, found, depth + 1)
    if n.name == "select_n" and len(n.inputs) == 3:
        condition, off, on = (_pair(x, read, found, depth + 1) for x in n.inputs)
        return None if condition != (0.0, 1.0) or off is None or on is None else (off[0], on[1])
    if n.name in ARITHMETIC and v.size > 1 and not compat.is_key(v.aval):
        args = [_pair(x, read, found, depth + 1) for x in n.inputs]
        if None in args:
            return None
        off, on = ([a[i] for a in args if a is not None] for i in (0, 1))
        return float(ARITHMETIC[n.name](*off)), float(ARITHMETIC[n.name](*on))
    return None
