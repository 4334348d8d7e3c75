"""The clause of the contract for each of a layer's `examples`: an option that changes the rule, or an edge.

All that is compared comes from one program in float64, which examples that differ in the values of arrays alone share, and is compared along a few
directions; at an edge the gradient in float32 is looked at too. Only what is found to be wrong is looked at entry by entry.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.check.derivatives import HIDES, no_nan_in, unless_once
from layers.check.gradcheck import gradcheck
from layers.check.second import Derivatives, beside, direction_at, slopes
from layers.check.subject import Subject, same, weights_of
from layers.function import engine

FAR = 1e3
"""Numbers of this size are an edge: their squares and exponentials leave what float32 holds well."""

STARTS = (1, 2, 3)
"""Of the directions."""


def subjects(fn: Any, first: Subject | None, examples: dict[str, tuple[Any, ...]]) -> dict[str, Subject]:
    """The layer at each of the examples, with the programs of those before it where they serve it."""
    known, found = [] if first is None else [first], {}
    for title, args in examples.items():
        new = found[title] = Subject(fn, args)
        alike = next((s for s in known if s.serves(new)), None)
        if alike is None:
            known.append(new)
        else:
            new.programs = alike.programs
    return found


def holds_there(s: Subject) -> str:
    """At an edge there is no NaN, and wherever there are differences, the derivatives are right."""
    if not s.differentiated:
        return "no floating-point array"
    arrays = list(map(np.asarray, s.differentiated))
    if not all(x.size and (np.abs(x) < FAR).all() for x in arrays):
        no_nan_in(s.compiled(*s.differentiated))
    if not all(x.size and np.isfinite(x).all() for x in arrays):
        return "no NaN"
    with jax.enable_x64(True):
        return _derivatives_are_right(s)


def _derivatives_are_right(s: Subject) -> str:
    moved = s.wide
    once = engine.current() != "linear" or unless_once(lambda: s.derivatives(moved, [direction_at(x) for x in moved])) is None
    for start in STARTS:
        direction = [direction_at(x, start) for x in moved]
        here = s.derivatives(moved, direction, once=once)
        no_nan_in(here.gradient)
        same(s.derivatives(moved, direction, size=-3.0, once=once).gradient, [-3 * g for g in here.gradient])
        if s.programs.derivatives_of_surrogate is not None:
            meant = s.programs.derivatives_of_surrogate(s.others, moved, direction, once=once)
            same(here.gradient, meant.gradient)
            same(here.second or (), meant.second or ())
            continue
        up, down = beside(s.derivatives, moved, direction, once=once)
        _compare_first(s, here, slopes([_loss(up)], [_loss(down)]), direction)
        if here.second is not None:
            _compare_second(here.second, slopes(up.gradient, down.gradient))
    said = "that of its surrogate" if s.programs.surrogate else "as finite differences"
    return said if once else f"{said}, and {'that of its surrogate' if s.programs.surrogate else 'as differences of the gradient'}"


def _loss(at: Derivatives) -> np.ndarray:
    return np.asarray(sum(np.sum(np.real(y * weights_of(y))) for y in at.outputs))


def _compare_first(s: Subject, here: Derivatives, slope: list[np.ndarray], direction: list[np.ndarray]) -> None:
    inner = sum(np.sum(np.real(g * d)) for g, d in zip(here.gradient, direction, strict=True))
    try:
        same([np.asarray(inner)], slope, tolerance=1e-5)
    except AssertionError:
        gradcheck(jax.jit(s.outputs), tuple(map(jnp.asarray, s.wide)))  # names the entry
        raise AssertionError(f"along a random direction the gradient is {inner:.8g}, but finite differences give {slope[0]:.8g}") from None


def _compare_second(found: list[Any], expected: list[Any]) -> None:
    try:
        same(found, expected)
    except AssertionError as error:
        raise AssertionError(f"{error} {HIDES}") from None
