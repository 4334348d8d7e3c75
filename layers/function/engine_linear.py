"""The engine of linear operations: one `jax.custom_jvp` a call, whose tangent is a linear operation with a transpose of its own.

Transposed, by reverse mode, that operation runs `backward`; evaluated, by forward mode, it runs the class's `jvp`, or else the transpose of
`backward`, which is the same linear map read the other way (`function/tangent.py`).

What `forward` saves are operands of that operation. Their number and kind may depend on `needs_input_grad` freely: each
differentiation of a call site has its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import compat
from layers.function.again import recorded
from layers.function.call import Call
from layers.function.record import Record, make_record
from layers.function.tangent import TangentMap

Outputs = tuple[list[Any], Callable[[list[Any]], Any]]


def apply(call: Call, arrays: Sequence[Any]) -> Outputs:
    """The arrays of the output, differentiable by the rule, and what makes the output of them."""
    filled: list[Callable[[list[Any]], Any]] = []

    def primal(*arrays: Any) -> list[Any]:
        outputs, fill = call.outputs(arrays)
        filled[:] = [fill]
        return outputs

    def linearize(primals: Sequence[Any], differentiated: tuple[bool, ...]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
        primals = tuple(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in primals)  # a number or NumPy array arrives here as such
        record, outputs, residuals = recorded(call.name, primals, lambda xs: make_record(call, xs, differentiated), lambda: apply(call, primals)[0])
        filled[:] = [record.output.fill]
        return outputs, functools.partial(_tangents, record, residuals)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        outputs, push = linearize(primals, tuple(not isinstance(t, compat.SymbolicZero) for t in tangents))
        return outputs, push([t for t in tangents if not isinstance(t, compat.SymbolicZero)])

    outputs = compat.linearized(arrays, linearize)
    if outputs is not None:
        return outputs, filled[0]
    primal.__name__ = primal.__qualname__ = call.name
    primal.__signature__ = _ANY_ARRAYS  # type: ignore[attr-defined]  # JAX asks for it at each call, and to work it out takes long
    rule.__signature__ = _PRIMALS_AND_TANGENTS  # type: ignore[attr-defined]
    f = jax.custom_jvp(primal)
    f.defjvp(rule, symbolic_zeros=True)
    outputs = f(*arrays)
    return outputs, filled[0]


def _tangents(record: Record, residuals: list[Any], differentiated: list[Any]) -> list[Any]:
    """The tangent of every array that `forward` returns, by the linear operation that `backward` transposes."""
    avals = [compat.tangent_type(a) for a in record.output_avals]
    if not differentiated or not any(record.differentiable):
        return [compat.SymbolicZero(a) for a in avals]
    tangent_map = TangentMap(
        name=record.call.name,
        residual_count=len(residuals),
        out_avals=tuple(a for a, d in zip(avals, record.differentiable, strict=True) if d),
        push=record.push,
        pull=record.pull,
        once=not record.call.cls._has_jvp() and record.once,
    )
    given = iter(tangent_map(residuals, differentiated))
    return [next(given) if d else compat.SymbolicZero(a) for a, d in zip(avals, record.differentiable, strict=True)]


_ANY_ARRAYS = inspect.Signature([inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)])
_PRIMALS_AND_TANGENTS = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("primals", "tangents")])
