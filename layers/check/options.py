"""What the checks ask of their options."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def require_number(who: str, value: Any, *, positive: bool) -> None:
    """Raises unless `value` is a number, positive and finite or, without `positive`, at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{who} is a {type(value).__name__}, but must be a number")
    if not (0 < value < np.inf if positive else value >= 0):
        raise ValueError(f"{who} is {value}, but must be {'a positive' if positive else 'no negative'} number")


def argument_places(who: str, given: Any, count: int) -> list[int]:
    """The places of the arguments that are named by one or several numbers, counted from the front; all of them for None.

    Raises:
        ValueError: where there is no such argument; TypeError: for what is no number.
    """
    if given is None:
        return list(range(count))
    numbers = list(given) if isinstance(given, (tuple, list, set, frozenset, range, np.ndarray)) else [given]
    places = []
    for number in numbers:
        try:
            place = operator.index(number)
        except TypeError:
            raise TypeError(f"{who} is {given!r}, but must be the place of an argument, such as 0, or several, such as (0, 1)") from None
        if isinstance(number, bool) or not -count <= place < count:
            raise ValueError(
                f"{who} names argument {number}, but there {'is 1' if count == 1 else f'are {count}'}: it must lie from {-count} to {count - 1}"
            )
        places.append(place % count)
    return places
