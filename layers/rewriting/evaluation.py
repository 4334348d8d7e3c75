"""Runs a graph with its matches, each operation under its own scopes and source line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from layers.core import compat
from layers.rewriting.graph import Graph, Node, Value
from layers.rewriting.match import Match


@dataclass
class Program:
    """A graph, the matches taken from it, and the order in which what is needed runs."""

    graph: Graph
    matches: list[Match]

    def __post_init__(self):
        self.order = steps_of(self.graph, self.matches)

    def __call__(self, *args: Any) -> list[Any]:
        values = {id(v): x for v, x in zip(self.graph.inputs, args, strict=True)}
        read = lambda v: values.get(id(v), v.const)
        for step in self.order:
            if isinstance(step, Match):
                with compat.traced_at(step.last.eqn, step.last.stack):
                    made = step.run(*map(read, step.inputs))
            else:
                with compat.traced_at(step.eqn, step.stack):
                    made = run_node(step, [read(v) for v in step.inputs])
            values.update((id(o), _like(x, o.aval)) for o, x in zip(step.outputs, made, strict=True))
        return [_like(read(v), a) for v, a in zip(self.graph.outputs, self.graph.out_avals, strict=True)]


def steps_of(graph: Graph, matches: Sequence[Match]) -> list[Node | Match]:
    """What is to be done, matches in place of their operations, each after what it reads from."""
    maker = {id(o): m for m in matches for o in m.outputs}
    inside = {n for m in matches for n in m.nodes}
    return _Order(maker, inside).of(graph)


def run_node(n: Node, args: Sequence[Any]) -> Sequence[Any]:
    return n.inner(*args) if n.inner is not None else compat.evaluate(n.eqn, args)


def _like(x: Any, aval: Any) -> Any:
    """`x` of the shape and dtype that it had in the original."""
    if not hasattr(aval, "shape") or compat.is_key(aval) or not hasattr(aval, "dtype"):
        return x
    return x if jnp.shape(x) == aval.shape and jnp.result_type(x) == aval.dtype else jnp.asarray(x).astype(aval.dtype).reshape(aval.shape)


class _Order:
    """The steps that outputs and side effects need, each after those that it reads from, and else in their old order."""

    def __init__(self, maker: dict[int, Match], inside: set[Node]):
        self.maker, self.inside = maker, inside
        self.done: set[int] = set()
        self.steps: list[Node | Match] = []

    def of(self, graph: Graph) -> list[Node | Match]:
        needed = self._needed(graph)
        for n in graph.nodes:
            for step in self._steps_at(n):
                if id(step) in needed:
                    self._add(step)
        return self.steps

    def _steps_at(self, n: Node) -> Iterator[Node | Match]:
        if n not in self.inside:
            yield n
        yield from {id(m): m for o in n.outputs if (m := self.maker.get(id(o))) is not None and m.last is n}.values()

    def _step_of(self, v: Value) -> Node | Match | None:
        return self.maker.get(id(v)) or v.node

    def _needed(self, graph: Graph) -> set[int]:
        found: set[int] = set()
        todo = [self._step_of(v) for v in graph.outputs] + [n for n in graph.nodes if n.eqn.effects]
        while todo:
            step = todo.pop()
            if step is not None and id(step) not in found:
                found.add(id(step))
                todo += [self._step_of(v) for v in step.inputs]
        return found

    def _add(self, step: Node | Match) -> None:
        stack = [step]
        while stack:
            top = stack[-1]
            below = [s for v in top.inputs if (s := self._step_of(v)) is not None and id(s) not in self.done]
            if id(top) in self.done or not below:
                stack.pop()
                if id(top) not in self.done:
                    self.done.add(id(top))
                    self.steps.append(top)
            else:
                stack += below
