"""Reads a jaxpr into a graph, in one spelling of what has many.

Jitted calls are inlined, so that `silu` or `take_along_axis` are what they compute. What changes nothing is dropped: x + 0, x * 1, max(x, -inf),
casts to the same dtype, reshapes to the same shape, selections by a constant, an update that replaces everything. Equal operations are one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import compat
from layers.rewriting.constants import number_of
from layers.rewriting.graph import Graph, Node, Value
from layers.rewriting.primitives import INLINED

UNITS = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "max": -math.inf}
"""The second operand with which these are the first."""


def read(jaxpr: Any, consts: Sequence[Any] = (), known: Mapping[int, Any] | None = None, carried: Collection[int] = ()) -> Graph:
    """The graph of a jaxpr; `known` holds the values of some of its inputs, by place, and `carried` the places of those that a loop carries."""
    reader = _Reader()
    inputs = [Value(v.aval, const=(known or {}).get(i)) for i, v in enumerate(jaxpr.invars)]
    for i in carried:
        inputs[i].is_lasting = False
    outputs = reader.read(jaxpr, [_constant(c) for c in consts], inputs, None)
    return Graph(inputs, reader.nodes, outputs, [v.aval for v in jaxpr.outvars])


def _constant(x: Any) -> Value:
    return Value(jax.typeof(x), const=x)


class _Reader:
    def __init__(self):
        self.nodes: list[Node] = []
        self.known: dict[Any, Node] = {}

    def read(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], stack: Any) -> list[Value]:
        values: dict[Any, Value] = dict(zip([*getattr(jaxpr, "constvars", ()), *jaxpr.invars], [*consts, *args], strict=True))

        def value_of(v: Any) -> Value:
            return values[v] if not hasattr(v, "val") else Value(v.aval, const=v.val)

        for eqn in jaxpr.eqns:
            inputs = [value_of(v) for v in eqn.invars]
            here = eqn.source_info.name_stack if stack is None else stack + eqn.source_info.name_stack
            values.update(zip(eqn.outvars, self.outputs_of(eqn, inputs, here), strict=True))
        return [value_of(v) for v in jaxpr.outvars]

    def outputs_of(self, eqn: Any, inputs: list[Value], stack: Any) -> list[Value]:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in INLINED and inner is not None and _is_plain_call(eqn):
            consts = [_constant(c) for c in getattr(inner, "consts", ())]
            return self.read(compat.open_jaxpr(inner), consts, inputs, stack)
        node = Node(eqn, inputs, stack)
        same = _identity(node)
        return self.once(node).outputs if same is None else [same]

    def once(self, n: Node) -> Node:
        """The node, or an equal one that is there already."""
        try:
            params = id(n) if n.eqn.effects else tuple(sorted(n.params.items()))
            found = self.known.setdefault((n.name, id(n.eqn.ctx), tuple(map(_name, n.inputs)), params), n)
        except TypeError:  # a parameter without a hash
            found = n
        if found is n:
            self.nodes.append(n)
        return found


def _name(v: Value) -> Any:
    """Equal for values that are equal."""
    if v.const is None or v.node is not None or v.size != 1 or isinstance(v.const, compat.Tracer) or compat.is_key(v.aval):
        return id(v)
    return str(v.dtype), v.shape, _is_weak(v), np.asarray(v.const, v.dtype).tobytes()


def _is_weak(v: Value) -> bool:
    return getattr(v.aval, "weak_type", False)


def _is_plain_call(eqn: Any) -> bool:
    """Whether a jitted call says nothing of shardings, donation or the compiler."""
    p = eqn.params
    shardings = (*p.get("in_shardings", ()), *p.get("out_shardings", ()))
    return all("Unspecified" in type(s).__name__ for s in shardings) and not any(p.get("donated_invars", ())) and not p.get("compiler_options_kvs")


def _identity(n: Node) -> Value | None:
    """The input that the only output of the node is equal to, or None."""
    if len(n.outputs) != 1 or not n.inputs:
        return None
    same = lambda v: v.shape == n.out.shape and v.dtype == n.out.dtype and _is_weak(v) == _is_weak(n.out) and not compat.is_key(v.aval)
    first = n.inputs[0]
    if n.name in ("convert_element_type", "reshape", "broadcast_in_dim", "copy", "copy_p", "squeeze", "expand_dims", "slice") and same(first):
        return first
    if n.name == "transpose" and tuple(n.params["permutation"]) == tuple(range(first.ndim)):
        return first
    if n.name == "dynamic_update_slice" and same(n.inputs[1]):
        return n.inputs[1]  # its start is clamped, so everything is replaced
    if n.name == "select_n" and (number := number_of(n.inputs[0])) is not None and same(chosen := n.inputs[1 + int(number)]):
        return chosen
    if n.name in UNITS and jnp.issubdtype(n.out.dtype, jnp.number):
        a, b = n.inputs
        if same(a) and number_of(b) == UNITS[n.name]:
            return a
        if n.name in ("add", "mul", "max") and same(b) and number_of(a) == UNITS[n.name]:
            return b
    return None
