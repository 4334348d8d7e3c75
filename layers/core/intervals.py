"""Intervals as they are written, such as "[0, 1)" or "(-inf, inf)": what lies in them, and how messages name them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any


@functools.lru_cache(maxsize=128)
def _bounds(within: str) -> tuple[float, float, Callable[[Any, Any], bool], Callable[[Any, Any], bool]]:
    low, high = within[1:-1].split(",")
    return _bound(low), _bound(high), operator.le if within[0] == "[" else operator.lt, operator.le if within[-1] == "]" else operator.lt


def _bound(text: str) -> float:
    return float(text) if "inf" in text or "." in text or "e" in text else int(text)


def lies(value: Any, within: str) -> bool:
    """Whether `value` lies in the interval; NaN lies in none."""
    low, high, above, below = _bounds(within)
    return above(low, value) and below(value, high)


def in_words(within: str) -> str:
    """What messages say of a number in the interval."""
    low, high, _, _ = _bounds(within)
    if low == -math.inf and high == math.inf:
        return "that is finite" if within == "(-inf, inf)" else "that is not NaN"
    if within[-1] == ")" and high == math.inf:
        return f"of at least {low}" if within[0] == "[" else f"above {low}"
    return f"in {within}"
