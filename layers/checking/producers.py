"""Where a value of a jaxpr comes from: the operation, the scope and the source line that made it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from layers.core import compat

_TRANSPARENT = frozenset({"name", "optimization_barrier", "copy", "copy_p", "pvary", "pcast", "reduce_precision", "convert_layout"})
_WRAPPER = re.compile(r"\b(?:jvp|transpose|vmap|linearize|remat|checkpoint|jit|pjit)\(([^()]*)\)")
_NOISE = frozenset({"", "while", "body", "cond", "scan", "closed_call", "rematted_computation", "checkpoint", "remat", "shmap", "custom_jvp_call"})


@dataclass
class Producer:
    """What made a value.

    Attributes:
        variable: the value itself, in `jaxpr`, after following it through calls.
        jaxpr: the program that it is a value of.
        eqn: the equation that computes it; None for an input.
        scope: named scopes around it, outermost first.
        name: the name that `checkpoint_name` gave it, or "".
        repeats: the length of each loop that stacked it.
        calls: the equations whose bodies it was followed into, outermost first.
    """

    variable: Any
    jaxpr: Any
    eqn: Any = None
    scope: list[str] = field(default_factory=list)
    name: str = ""
    repeats: list[int] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)


def find_producer(jaxpr: Any, variable: Any) -> Producer:
    """Follows `variable`, an output of `jaxpr`, into jitted, rematerialised, scanned and custom calls to what computes it."""
    return _follow(Producer(variable, jaxpr))


def _follow(p: Producer) -> Producer:
    while True:
        eqn = _producers(p.jaxpr).get(id(p.variable))
        if eqn is None:
            p.eqn = None
            return p
        p.eqn = eqn
        if eqn.primitive.name in _TRANSPARENT:
            p.name = p.name or eqn.params.get("name", "")
            source = eqn.invars[eqn.outvars.index(p.variable)]
            if not hasattr(source, "aval") or hasattr(source, "val"):
                return p
            p.variable = source
            continue
        p.scope.append(str(eqn.source_info.name_stack))
        body = _body(eqn)
        if body is None or len(body.outvars) != len(eqn.outvars):
            return p
        inner_variable = body.outvars[eqn.outvars.index(p.variable)]
        if hasattr(inner_variable, "val"):
            return p
        stacked = eqn.primitive.name == "scan" and p.variable.aval.ndim > inner_variable.aval.ndim
        inner = _follow(Producer(inner_variable, body, name=p.name))
        if inner.eqn is None:
            outer = _as_operand(eqn, body, inner.variable)
            if outer is None or eqn.primitive.name == "scan":
                return p
            p.scope.pop()
            p.variable = outer
            continue
        repeats = [eqn.params["length"]] if stacked else []
        return Producer(
            inner.variable, inner.jaxpr, inner.eqn, p.scope + inner.scope, inner.name, p.repeats + repeats + inner.repeats, [eqn, *inner.calls]
        )


_cache: dict[int, tuple[Any, dict[int, Any]]] = {}


def _producers(jaxpr: Any) -> dict[int, Any]:
    held = _cache.get(id(jaxpr))
    if held is None or held[0] is not jaxpr:
        if len(_cache) > 256:
            _cache.clear()
        held = _cache[id(jaxpr)] = (jaxpr, {id(v): e for e in jaxpr.eqns for v in e.outvars})
    return held[1]


def _body(eqn: Any) -> Any:
    for key in ("call_jaxpr", "jaxpr", "fwd_jaxpr"):
        if eqn.params.get(key) is not None:
            return compat.open_jaxpr(eqn.params[key])
    return None


def _as_operand(eqn: Any, body: Any, variable: Any) -> Any:
    """The operand of a call that an input of its body stands for."""
    if len(body.invars) != len(eqn.invars) or not any(variable is v for v in body.invars):
        return None
    operand = eqn.invars[next(i for i, v in enumerate(body.invars) if v is variable)]
    return None if hasattr(operand, "val") else operand


def clean_scope(scopes: list[str]) -> str:
    """Named scopes as a path, without the marks of the transformations."""
    text = "/".join(scopes)
    while (shorter := _WRAPPER.sub(r"\1", text)) != text:
        text = shorter
    return "/".join(part for part in text.split("/") if part not in _NOISE)
