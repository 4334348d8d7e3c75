"""Perceptrons with one hidden layer: f(x @ up) @ down, or (f(x @ gate) * (x @ up)) @ down, with biases or without, in any layout of the products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from layers.perceptrons.gated_mlp import gated_mlp
from layers.perceptrons.mlp import mlp
from layers.rewriting.activations import activation_of, arguments_of
from layers.rewriting.axes import Atom, Axis, arrange, dot_axes, equal, flat, forward, new_axes, restore, spread_axes, unify
from layers.rewriting.graph import Node, Value
from layers.rewriting.match import Match, given, need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.walk import compact, is_product


@dataclass
class Affine:
    """x @ kernel + bias with axes in atoms; `axes` are those of what it gives, and the kernel is the operand `side`."""

    product: Node
    operand_axes: tuple[list[Axis], list[Axis]]
    axes: list[Axis]
    side: int = 1
    bias: Value | None = None
    bias_axes: list[Axis] | None = None

    @property
    def x(self) -> Value:
        return self.product.inputs[1 - self.side]

    @property
    def x_axes(self) -> list[Axis]:
        return self.operand_axes[1 - self.side]

    @property
    def kernel(self) -> Value:
        return self.product.inputs[self.side]

    @property
    def kernel_axes(self) -> list[Axis]:
        return self.operand_axes[self.side]

    @property
    def contracted(self) -> list[Atom]:
        """The features that it sums over."""
        return flat([self.operand_axes[0][i] for i in self.product.params["dimension_numbers"][0][0]])

    @property
    def made(self) -> list[Atom]:
        """The features that it makes."""
        return [a for a in flat(self.kernel_axes) if a not in self.contracted]

    def has_bias_of_features(self) -> bool:
        return self.bias_axes is None or set(flat(self.bias_axes)) <= set(self.made)


def _affine(v: Value, nodes: set[Node]) -> Affine | None:
    """The linear map that `v` is, laid out in any way; which operand is the kernel is not settled."""
    n, bias = v.node, None
    inner: set[Node] = set()
    product, chain = _product_below(v)
    if product is None and n is not None and n.name == "add":
        for a, b in (n.inputs, n.inputs[::-1]):
            product, chain = _product_below(a) if a.only_user is n and a.shape == v.shape else (None, [])
            if product is not None:
                bias = b
                inner.add(n)
                break
    if product is None or not is_product(product) or product.params["dimension_numbers"][1][0]:
        return None
    left, right = (new_axes(x.shape) for x in product.inputs)
    axes = forward(chain, dot_axes(product, left, right))
    if axes is None:
        return None
    found = Affine(product, (left, right), axes)
    if bias is not None:
        spread = spread_axes(bias, v, axes)
        if spread is None:
            return None
        found.bias, found.bias_axes = compact(bias, spread, set())
    nodes |= inner | {product, *chain}
    return found


def _product_below(v: Value) -> tuple[Node | None, list[Node]]:
    """The product of matrices that `v` is in another layout, and the nodes that lay it out, last first."""
    chain: list[Node] = []
    while v.node is not None and v.node.name in LAYOUT and v.node.inputs[0].size == v.size and v.node.inputs[0].only_user is v.node:
        chain.append(v.node)
        v = v.node.inputs[0]
    return (v.node, chain) if v.node is not None and v.node.name == "dot_general" else (None, [])


def find_mlp(n: Node) -> list[Match]:
    """The perceptron whose last product is `n`."""
    if n.name != "dot_general" or not is_product(n) or n.inputs[0] is n.inputs[1] or n.params["dimension_numbers"][1][0]:
        return []
    for side in (0, 1):
        operand, chain = n.inputs[side], []
        while (
            operand.only_user is not None and operand.node is not None and operand.node.name in LAYOUT and operand.node.inputs[0].size == operand.size
        ):
            chain.append(operand.node)
            operand = operand.node.inputs[0]
        if operand.only_user is not None and operand.node is not None and (found := _before(n, side, operand, chain)) is not None:
            return [found]
    return []


def _before(n: Node, side: int, hidden: Value, chain: list[Node]) -> Match | None:
    """The perceptron whose hidden layer is `hidden`, which `chain` lays out for the product `n`."""
    assert hidden.node is not None
    ways: list[tuple[Value, Value | None]] = [(hidden, None)]
    if hidden.node.name == "mul":
        a, b = hidden.node.inputs
        ways = [(a, b), (b, a), (hidden, None)]
    for activated, up in ways:
        for argument in arguments_of(activated):
            if argument.shape != hidden.shape or argument.node is None or argument.node.name not in {"add", "dot_general"} | LAYOUT:
                continue
            nodes: set[Node] = {n, *chain}
            name = activation_of(activated, argument, nodes)
            first = _affine(argument, nodes) if name is not None else None
            if first is None or name is None or not _settle(first, n, side, chain):
                continue
            second = _gate(hidden, up, first, nodes) if up is not None else None
            if up is None or second is not None:
                return _match(n, side, hidden, name, nodes, first, second, forward(chain, first.axes) or [])
    return None


def _settle(first: Affine, n: Node, side: int, chain: list[Node]) -> bool:
    """Settles that the kernel is the operand that makes the features which `n` sums over; False where there is none."""
    axes = forward(chain, first.axes)
    if axes is None:
        return False
    hidden = set(flat([axes[i] for i in n.params["dimension_numbers"][0][side]]))
    first.side = 1
    if set(first.made) != hidden:
        first.side = 0
    return set(first.made) == hidden and first.has_bias_of_features()


def _gate(hidden: Value, up: Value, first: Affine, nodes: set[Node]) -> Affine | None:
    """The second map of a gated perceptron: of the same rows, in the same layout."""
    assert hidden.node is not None
    second = _affine(up, inner := {hidden.node}) if up.only_user is hidden.node else None
    if second is None or first.x not in second.product.inputs or second.product is first.product:
        return None
    second.side = 1 - second.product.inputs.index(first.x)
    pairs = [*zip(second.x_axes, first.x_axes, strict=True), *zip(second.axes, first.axes, strict=True)]
    if not all(unify(a, b) for a, b in pairs) or not equal(second.axes, first.axes) or not second.has_bias_of_features():
        return None
    nodes |= inner
    return second


def _down(n: Node, side: int, axes: list[Axis], nodes: set[Node]) -> tuple[Affine, Value]:
    """The last map, of rows with these axes, and what it makes, with the bias where there is one."""
    u = n.out.only_user
    for end in [u.out] if u is not None and u.name == "add" and u.out.shape == n.out.shape else []:
        found = _affine(end, inner := set())
        if found is not None and found.product is n:
            found.side = 1 - side
            if all(unify(a, b) for a, b in zip(found.x_axes, axes, strict=True)) and found.has_bias_of_features():
                nodes |= inner
                return found, end
    found = given(_affine(n.out, nodes), "the second product is no linear map of rows")
    found.side = 1 - side
    need(all(unify(a, b) for a, b in zip(found.x_axes, axes, strict=True)), "the axes of the two products do not fit")
    return found, n.out


def _match(n: Node, side: int, hidden: Value, name: str, nodes: set[Node], first: Affine, second: Affine | None, axes: list[Axis]) -> Match:
    down, end = _down(n, side, axes, nodes)
    rows = [a for a in flat(first.x_axes) if a not in first.contracted]
    need(set(down.contracted) == set(first.made), "the second product is not over all features of the hidden layer")
    maps = [first, down] if second is None else [first, second, down]
    need(len({v.dtype for m in maps for v in (m.x, m.kernel)}) == 1, "the products have operands of several dtypes")
    features, made = first.contracted, down.made
    hidden_features = first.made
    kernels = [[features, hidden_features]] * (len(maps) - 1) + [[hidden_features, made]]
    biased = [m for m in maps if m.bias is not None]

    def run(x: Any, *rest: Any) -> list[Any]:
        values = iter(rest)
        weights = [arrange(next(values), m.kernel_axes, groups) for m, groups in zip(maps, kernels, strict=True)]
        biases = [
            None if m.bias is None else _spread(arrange(next(values), m.bias_axes or [], groups[1:]), g.shape[1])
            for m, groups, g in zip(maps, kernels, weights, strict=True)
        ]
        x = arrange(x, first.x_axes, [rows, features])
        y = (mlp if second is None else gated_mlp)(x, *weights, *biases, activation=name)
        return [restore(y, [rows, made], down.axes, end.shape).astype(end.dtype)]

    inputs = [first.x, *(m.kernel for m in maps), *(m.bias for m in biased if m.bias is not None)]
    keeps = (len(maps) - 1) * hidden.bytes + 4 * sum(m.kernel.size for m in maps)
    return Match("mlp" if second is None else "gated_mlp", nodes, inputs, [end], run, keeps=keeps, detail=name)


def _spread(x: Any, size: int) -> Any:
    return jnp.broadcast_to(x, (size,))
