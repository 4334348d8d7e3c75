"""A part of a graph as one rule that keeps the cheapest values and computes the others again.

    outs, residuals = forward(ins)           both as JAX differentiates the part
    kept            = a minimum cut of what the residuals are computed from, by operations that cost little
    d ins           = pull(residuals(kept), d outs)

Arguments and results that are alive anyway cost nothing. The residuals are computed again behind a barrier, or XLA would take them from the forward
pass. Products of matrices are never computed again: where the residuals depend on what one gives, that is kept.

Saved: the cut. Reference: the partitioner of PyTorch's AOTAutograd keeps a minimum cut of the whole graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import compat
from layers.core.deferred import zero_after
from layers.core.recompute import barrier, is_transposing
from layers.core.trees import is_inexact, replaced
from layers.function.function import Function
from layers.rewriting.cut import cheapest
from layers.rewriting.evaluation import run_node
from layers.rewriting.graph import Node, Value
from layers.rewriting.kept import Kept
from layers.rewriting.match import Match
from layers.rewriting.primitives import is_light
from layers.rewriting.profit import PRODUCTS
from layers.rewriting.reading import read


@dataclass(frozen=True, eq=False)
class Part:
    """Operations in order, what they read and make, and which of that is alive in the backward pass anyway."""

    nodes: list[Node]
    inputs: list[Value]
    outputs: list[Value]
    free: frozenset[int]

    @staticmethod
    def of(nodes: Collection[Node], kept: Kept) -> Part:
        order = sorted(nodes, key=lambda n: n.place)
        inputs = Part.inputs_of(order)
        outputs = [o for n in order for o in n.outputs if o.kept or any(u not in nodes for u in o.users)]
        free = {i for i, v in enumerate([*inputs, *outputs]) if kept.without(v, nodes)}
        return Part(order, inputs, outputs, frozenset(free))

    @staticmethod
    def inputs_of(nodes: Collection[Node]) -> list[Value]:
        """What these operations read and do not make; what is known is part of the program."""
        made = {id(o) for n in nodes for o in n.outputs}
        read = {id(v): v for n in nodes for v in n.inputs if id(v) not in made and (v.const is None or isinstance(v.const, compat.Tracer))}
        return list(read.values())

    def run(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(evaluate(self.nodes, self.inputs, arrays, self.outputs))


def match_of(name: str, nodes: set[Node], part: Part, detail: str) -> Match:
    m = Match(name, nodes, part.inputs, part.outputs, lambda *arrays: RecomputedFunction.apply(part, *arrays), detail=detail)
    m.pattern = name
    return m


class RecomputedFunction(Function):
    @staticmethod
    def forward(ctx, part, *arrays):
        wanted = [i for i, (x, needs) in enumerate(zip(arrays, ctx.needs_input_grad[1:], strict=True)) if needs]
        if not wanted:
            return part.run(arrays)
        ctx.plan = plan = Plan(part, arrays, wanted)
        made = evaluate(plan.before, plan.graph.inputs, arrays, [*plan.outputs, *plan.kept])
        ctx.save_for_backward(*made[len(plan.outputs) :])
        return tuple(made[: len(plan.outputs)])

    @staticmethod
    def backward(ctx, *grads):
        plan = ctx.plan
        kept, grads = barrier(ctx.saved_tensors, [g for g, o in zip(grads, plan.outputs, strict=True) if is_inexact(o)])
        found = dict(zip(plan.wanted, plan.pull(kept, grads), strict=True))
        return None, *(found.get(i) for i in range(len(plan.graph.inputs)))


class Plan:
    """How a part is differentiated with respect to some of its inputs.

    Attributes:
        graph: from the inputs to the outputs and to what JAX's derivative of the part reads.
        kept: the values that are saved.
        before, after: the operations of the forward pass, and those from the kept values to what the derivative reads.
        is_heavy: whether a product reads what is made again, which then is an array in memory.
    """

    def __init__(self, part: Part, arrays: Sequence[Any], wanted: Sequence[int]):
        self.wanted = wanted
        traced = jax.make_jaxpr(lambda *arrays: self._linearized(part, arrays))(*arrays)
        self.graph = read(compat.open_jaxpr(traced), traced.consts)
        count = len(part.outputs)
        self.outputs, self.residuals = self.graph.outputs[:count], self.graph.outputs[count:]
        light = [n for n in self.graph.nodes if is_light(n)]
        self.is_heavy = any(n.name in PRODUCTS for n in part.nodes)
        made = {id(o) for n in light for o in n.outputs}
        border = [*self.graph.inputs, *self.outputs]
        free = {id(border[i]) for i in part.free}
        starts = [v for n in light for v in n.inputs if id(v) not in made and v.const is None]
        starts += [v for v in self.residuals if id(v) not in made and v.const is None]
        self.kept = cheapest(light, starts, self.residuals, border=border, free=free)
        self.before = between(self.graph.nodes, self.graph.inputs, [*self.outputs, *self.kept])
        self.after = between(self.graph.nodes, self.kept, self.residuals)

    def _linearized(self, part: Part, arrays: Sequence[Any]) -> list[Any]:
        def moved(*some: Any) -> Any:
            outs = part.run(replaced(arrays, self.wanted, some))
            return [y for y in outs if is_inexact(y)], outs

        _, pull, outs = jax.vjp(moved, *(arrays[i] for i in self.wanted), has_aux=True)
        residuals, self.tree = jax.tree.flatten(pull)
        return [*outs, *residuals]

    def pull(self, kept: Sequence[Any], grads: Sequence[Any]) -> Sequence[Any]:
        known = {id(v): x for v, x in zip(self.kept, kept, strict=True)}
        again = evaluate(self.after, self.kept, [late(x, grads) for x in kept] if self.is_heavy else kept, self.residuals)
        residuals = [known.get(id(v), x) for v, x in zip(self.residuals, again, strict=True)]
        return jax.tree.unflatten(self.tree, residuals)(list(grads))


def late(x: jax.Array, grads: Sequence[jax.Array]) -> jax.Array:
    """`x`, by a choice that XLA cannot foresee: what a product reads of it is made when the gradient is there, and not early, to lie in wait."""
    if is_transposing() or compat.is_key(x):
        return x
    return jnp.where(zero_after(grads[0]) == 0, x, jnp.zeros((), x.dtype))


def between(nodes: Sequence[Node], given: Sequence[Value], ends: Sequence[Value]) -> list[Node]:
    """Those of the operations, which are in order, that compute the ends from the given values."""
    known, needed, found = {id(v) for v in given}, {id(v) for v in ends}, []
    for n in reversed(nodes):
        if any(id(o) in needed - known for o in n.outputs):
            found.append(n)
            needed.update(id(v) for v in n.inputs)
    return found[::-1]


def evaluate(nodes: Sequence[Node], given: Sequence[Value], arrays: Sequence[Any], ends: Sequence[Value]) -> list[Any]:
    """The ends, computed by these operations from arrays in place of the given values."""
    known = {id(v): x for v, x in zip(given, arrays, strict=True)}
    value_of = lambda v: known.get(id(v), v.const)
    for n in nodes:
        with compat.traced_at(n.eqn, n.stack):
            made = run_node(n, [value_of(v) for v in n.inputs])
        known.update((id(o), x) for o, x in zip(n.outputs, made, strict=True) if id(o) not in known)
    return [value_of(v) for v in ends]
