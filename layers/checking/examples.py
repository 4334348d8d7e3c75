"""The clause of the contract for each of a layer's `examples`: an option that changes the rule, or an edge.

All that is compared comes from one program in float64, which examples that differ in the values of arrays alone share, and is compared along a few
directions; at an edge the gradient in float32 is looked at too. Only what is found to be wrong is looked at entry by entry.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.checking.derivatives import HIDES, no_nan_in, unless_once
from layers.checking.gradcheck import gradcheck
from layers.checking.second import STEP, Derivatives, beside, direction_at, slopes
from layers.checking.subject import Subject, same, weights_of
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
    of_surrogate = s.programs.derivatives_of_surrogate
    for start in STARTS:
        direction = [direction_at(x, start) for x in moved]
        here = s.derivatives(moved, direction, once=once)
        no_nan_in(here.gradient)
        same(s.derivatives(moved, direction, size=-3.0, once=once).gradient, [-3 * g for g in here.gradient])
        up, down = beside(s.derivatives, moved, direction, once=once)
        meant = of_surrogate and of_surrogate(s.others, moved, direction, once=once)
        if meant is None:
            _compare_first(s, here, up, down, direction)
        else:
            same(here.gradient, meant.gradient)
        if here.second is not None:
            _compare_second(here.second, slopes(up.gradient, down.gradient), meant and meant.second)
    said = "as finite differences" if of_surrogate is None else "that of its surrogate"
    return said if once else f"{said}, and its derivative is right"


def _compare_first(s: Subject, here: Derivatives, up: Derivatives, down: Derivatives, direction: list[np.ndarray]) -> None:
    """Of the loss along the direction, without outputs that are infinite, which nothing moves."""
    slope = noise = 0.0
    for y, a, b in zip(here.outputs, up.outputs, down.outputs, strict=True):
        w, y, a, b = (x[np.isfinite(y)] for x in (weights_of(y), y, a, b))
        slope += np.sum(np.real(w * (a - b))) / (2 * STEP)
        noise += np.sum(np.abs(w * y)) * np.finfo(np.float64).eps / STEP
    inner = sum(np.sum(np.real(g * d)) for g, d in zip(here.gradient, direction, strict=True))
    if not abs(inner - slope) <= 1e-5 * max(1, abs(slope)) + noise:
        gradcheck(jax.jit(s.outputs), tuple(map(jnp.asarray, s.wide)))  # names the entry
        raise AssertionError(f"along a random direction the gradient is {inner:.8g}, but finite differences give {slope:.8g}")


def _compare_second(found: list[Any], differences: list[Any], of_surrogate: list[Any] | None) -> None:
    try:
        same(found, differences)
    except AssertionError as error:
        if of_surrogate is None:
            raise AssertionError(f"{error} {HIDES}") from None
        same(found, of_surrogate)
