"""Whether a traced function is linear, which JAX does not ask before it transposes.

`jax.linear_transpose` transposes the operations that lead from an input to an output through floating-point numbers: what an input decides by a
comparison is taken for a constant, and what is added to it is dropped. Here every value of the program is one of

    zero        does not depend on the inputs, and is 0
    constant    does not depend on the inputs
    linear      depends on them, and is 0 where they are
    a fault     depends on them in another way, which is said

and the outputs have to be zero or linear. Products and the like are left to JAX, which transposes no operation in two linear operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from layers.core import compat

ZERO, CONSTANT, LINEAR = "zero", "constant", "linear"

_SUMMANDS: dict[str, Callable[[Sequence[str]], Sequence[str]]] = {
    **dict.fromkeys(("add", "sub", "add_any", "concatenate", "complex", "pad", "max", "min"), lambda s: s),
    **dict.fromkeys(("scatter-add", "scatter_add", "scatter", "scatter-sub"), lambda s: (s[0], s[2])),
    "dynamic_update_slice": lambda s: s[:2],
    "select_n": lambda s: s[1:],
}
"""Operations that are 0 where all of these operands are."""

_FACTORS = ("mul", "dot_general", "conv_general_dilated", "ragged_dot_general")
"""Operations that are 0 where one operand is."""

_MOVES = (
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "convert_element_type",
    "neg",
    "copy",
    "squeeze",
    "expand_dims",
    "slice",
    "dynamic_slice",
    "rev",
    "real",
    "imag",
    "conj",
    "gather",
    "reduce_sum",
    "cumsum",
    "div",
    "name",
    "stop_gradient",
    "sharding_constraint",
    "reshard",
    "mesh_cast",
    "pvary",
    "pcast",
    "all_gather",
    "abs",
    "sign",
    "square",
    "split",
    "integer_pow",
)
"""Operations that are 0 where the first operand is."""

_ONE_BY_ONE = ("optimization_barrier", "psum", "psum_invariant", "ppermute", "device_put")
"""Operations whose outputs are each made of one operand."""


def why_not_linear(closed: Any) -> str | None:
    """Why the function that a closed jaxpr stands for is not linear; None where it is, or where JAX will refuse to transpose it."""
    for known in (False, True):  # to look at the values of constants takes time, which most programs need not
        consts = [_of_value(c) if known else CONSTANT for c in closed.consts]
        fault = next(filter(None, map(_as_fault, _states(closed.jaxpr, consts + [LINEAR] * len(closed.in_avals)))), None)
        if fault is None:
            return None
    return fault


def _as_fault(state: str) -> str | None:
    if state == CONSTANT:
        return "a gradient that it returns does not depend on the incoming one"
    return None if state in (ZERO, LINEAR) else state


def _of_value(value: Any) -> str:
    if isinstance(value, compat.Tracer) or jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return CONSTANT
    return CONSTANT if np.any(np.asarray(value) != 0) else ZERO


def _states(jaxpr: Any, inputs: Sequence[str]) -> list[str]:
    """The states of the outputs of an open jaxpr, from those of its constants and inputs."""
    states = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

    def read(v: Any) -> str:
        return _of_value(v.val) if hasattr(v, "val") else states[v]

    for eqn in jaxpr.eqns:
        states.update(zip(eqn.outvars, _outputs(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _outputs(eqn: Any, inputs: list[str]) -> list[str]:
    name = eqn.primitive.name
    fault = next((s for s in inputs if s not in (ZERO, CONSTANT, LINEAR)), None)
    if fault is not None:
        return [fault] * len(eqn.outvars)
    if name == "scan":
        return _scan(eqn, inputs)
    if name == "cond":
        return _cond(eqn, inputs)
    if name in _ONE_BY_ONE:
        return list(inputs)
    inner = _inner(eqn)
    if inner is not None:
        return _states(inner[0], [*inner[1], *inputs])
    state = _combined(name, inputs)
    if state != LINEAR:
        return [state] * len(eqn.outvars)
    return [state if jax.dtypes.issubdtype(v.aval.dtype, np.inexact) else f"`{name}` decides by the gradient" for v in eqn.outvars]


def _combined(name: str, inputs: list[str]) -> str:
    """The state of the result of a single operation."""
    if name in _SUMMANDS:
        vanishes = CONSTANT not in _SUMMANDS[name](inputs)
    elif name in _FACTORS:
        vanishes = ZERO in inputs
    else:
        vanishes = name in _MOVES and inputs[0] == ZERO
    if LINEAR not in inputs:
        return ZERO if vanishes else CONSTANT
    return LINEAR if vanishes or name not in _SUMMANDS else f"`{name}` joins to the gradient what does not depend on it"


def _join(a: str, b: str) -> str:
    """The state of a value that is one or the other."""
    if a == b or b == ZERO:
        return a
    if a == ZERO:
        return b
    return next((s for s in (a, b) if s not in (CONSTANT, LINEAR)), "a loop or branch joins to the gradient what does not depend on it")


def _scan(eqn: Any, inputs: list[str]) -> list[str]:
    body, consts = _opened(eqn.params["jaxpr"])
    last, carried = _unstacked(eqn.invars, body.invars), _unstacked(eqn.outvars, body.outvars)
    first = last - carried
    carry = inputs[first:last]
    while True:
        outputs = _states(body, [*consts, *inputs[:first], *carry, *inputs[last:]])
        after = [_join(a, b) for a, b in zip(carry, outputs, strict=False)]
        if after == carry:
            return carry + outputs[len(carry) :]
        carry = after


def _unstacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many of the operands or results of a loop are for each step what they are for the loop: these come first."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))


def _cond(eqn: Any, inputs: list[str]) -> list[str]:
    if inputs[0] == LINEAR:
        return ["`cond` decides by the gradient"] * len(eqn.outvars)
    branches = [_states(body, [*consts, *inputs[1:]]) for body, consts in map(_opened, eqn.params["branches"])]
    outputs = branches[0]
    for branch in branches[1:]:
        outputs = [_join(a, b) for a, b in zip(outputs, branch, strict=True)]
    return outputs


def _opened(jaxpr: Any) -> tuple[Any, list[str]]:
    """An open jaxpr and the states of its constants."""
    return compat.open_jaxpr(jaxpr), [CONSTANT] * len(getattr(jaxpr, "consts", ()))


def _inner(eqn: Any) -> tuple[Any, list[str]] | None:
    """The jaxpr that an operation such as `jit` or `checkpoint` runs on its operands."""
    for value in eqn.params.values():
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            jaxpr, consts = _opened(value)
            if len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars):
                return jaxpr, consts
    return None
