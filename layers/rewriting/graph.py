"""A traced function as a graph: nodes, which are operations of JAX, and the values between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.core import compat


class Value:
    """An array: an argument, a constant, or an output of a node.

    Attributes:
        aval: its JAX type.
        node: what computes it; None for an argument or a constant.
        const: the array, where it is a constant or an argument whose value is known.
        users: the nodes that read it, one entry a reading.
        kept: whether it is an output of the graph.
        differentiated: whether it depends on an argument through floating-point numbers, so that a gradient may go through it.
        is_lasting: whether it is there in the backward pass whatever is kept: a constant, or an argument that is no carry of a loop.
    """

    __slots__ = ("_static", "aval", "const", "differentiated", "is_lasting", "kept", "node", "users")

    def __init__(self, aval: Any, node: Node | None = None, const: Any = None):
        self.aval, self.node, self.const = aval, node, const
        self.users: list[Node] = []
        self.kept, self.differentiated, self.is_lasting = False, False, node is None
        self._static: bool | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype

    @property
    def ndim(self) -> int:
        return len(self.aval.shape)

    @property
    def size(self) -> int:
        return math.prod(self.aval.shape)

    @property
    def bytes(self) -> int:
        return self.size * (8 if compat.is_key(self.aval) else np.dtype(self.dtype).itemsize)

    @property
    def only_user(self) -> Node | None:
        """The one node that reads it, where nothing else does."""
        return self.users[0] if len(set(self.users)) == 1 and not self.kept else None


class Node:
    """One operation.

    Attributes:
        name: of the JAX primitive.
        eqn: the equation it was read from.
        params: those of the equation.
        inputs, outputs: values.
        stack: the named scopes around it.
        place: its position in the graph.
        inner: how to run it where it holds a function that was rewritten; None to run the equation as it is.
    """

    __slots__ = ("eqn", "inner", "inputs", "name", "outputs", "params", "place", "stack")

    def __init__(self, eqn: Any, inputs: list[Value], stack: Any):
        self.name, self.eqn, self.params = eqn.primitive.name, eqn, eqn.params
        self.inputs, self.stack = inputs, stack
        self.outputs = [Value(v.aval, self) for v in eqn.outvars]
        self.place = -1
        self.inner: Callable[..., Sequence[Any]] | None = None

    @property
    def out(self) -> Value:
        return self.outputs[0]

    def other(self, value: Value) -> Value:
        """The second operand of a node that reads `value` and one more."""
        a, b = self.inputs
        return b if a is value else a


class Graph:
    """What a jaxpr computes, in order; what nothing reads is dropped."""

    def __init__(self, inputs: list[Value], nodes: list[Node], outputs: list[Value], out_avals: list[Any]):
        self.inputs, self.nodes, self.outputs, self.out_avals = inputs, nodes, outputs, out_avals
        self._drop_dead()
        self._index()
        self._mark_moving()

    def _drop_dead(self) -> None:
        live, needed = set(), {id(v) for v in self.outputs}
        for n in reversed(self.nodes):
            if n.eqn.effects or any(id(o) in needed for o in n.outputs):
                live.add(n)
                needed.update(id(v) for v in n.inputs)
        self.nodes = [n for n in self.nodes if n in live]

    def _index(self) -> None:
        values = [*self.inputs, *self.outputs, *(v for n in self.nodes for v in (*n.inputs, *n.outputs))]
        for v in values:
            v.users, v.kept = [], False
        for place, n in enumerate(self.nodes):
            n.place = place
            for v in n.inputs:
                v.users.append(n)
        for v in self.outputs:
            v.kept = True

    def _mark_moving(self) -> None:
        for v in self.inputs:
            v.differentiated = is_float(v) and v.const is None
        for n in self.nodes:
            moves = n.name != "stop_gradient" and any(v.differentiated for v in n.inputs)
            for o in n.outputs:
                o.differentiated = moves and is_float(o)


def is_float(v: Value) -> bool:
    return jnp.issubdtype(v.dtype, jnp.floating)


def widens(n: Node) -> bool:
    """Whether a node casts floating-point numbers to floating-point numbers."""
    return n.name == "convert_element_type" and is_float(n.inputs[0]) and is_float(n.out)
