"""The clauses of the contract on the first and the second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from layers.checking.gradcheck import gradcheck
from layers.checking.report import Skip
from layers.checking.second import RAYS, beside, direction_at, nan_on_rays, slopes
from layers.checking.subject import Programs, Subject, same, widen
from layers.function import engine


def no_nan(s: Subject) -> None:
    no_nan_in(s.expected)


def no_nan_in(gradients: Sequence[Any]) -> None:
    for i, g in enumerate(map(np.asarray, gradients)):
        assert not np.isnan(g).any(), f"the gradient of array {i} is NaN at {tuple(map(int, np.argwhere(np.isnan(g))[0]))}"


def gradient_is_right(s: Subject) -> str:
    if s.programs.surrogate is None:
        with jax.enable_x64(True):
            gradcheck(jax.jit(s.outputs), tuple(widen(x) for x in s.differentiated))  # without jit each operation is compiled by itself
        return "as finite differences"
    meant = jax.jit(Programs(s.programs.surrogate, None).gradient)
    same(s.compiled(*s.differentiated), meant(s.others, *s.differentiated))
    return "that of its surrogate"


def second_derivative_is_right(s: Subject) -> str:
    needs_forward_mode()
    with jax.enable_x64(True):
        direction = [direction_at(x) for x in s.wide]
        here = unless_once(lambda: s.derivatives(s.wide, direction))
        if here is None:
            raise Skip("differentiable once")
        up, down = beside(s.derivatives, s.wide, direction)
        try:
            same(here.second or (), slopes(up.gradient, down.gradient))
            return "as differences of the gradient"
        except AssertionError as error:
            if s.programs.derivatives_of_surrogate is None:
                raise AssertionError(f"{error} {HIDES}") from None
        same(here.second or (), s.programs.derivatives_of_surrogate(s.others, s.wide, direction).second or ())
    return "that of its surrogate"


HIDES = "from differences of the gradient: backward hides how it depends on the arguments?"


def unless_once(derivatives: Callable[[], Any]) -> Any:
    """The derivatives, or None for a rule that is decorated with `once_differentiable`."""
    try:
        return derivatives()
    except RuntimeError as error:
        if "@once_differentiable" in str(error):
            return None
        raise


def far_out(s: Subject) -> str:
    needs_forward_mode()
    rays = getattr(s.cls, "rays", RAYS)
    if not rays or (s.cls is not None and hasattr(s.cls.backward, "once_differentiable")):
        raise Skip("no rays" if not rays else "differentiable once")
    with jax.enable_x64(True):
        fault = nan_on_rays(s.derivatives, s.wide, rays)
    assert fault is None, fault
    return f"no NaN at {', '.join(f'{r:g}' for r in rays)} times the example"


def needs_forward_mode() -> None:
    if engine.current() != "linear":
        raise Skip(f"the engine '{engine.current()}' has no forward mode")
