"""Back from logits to the product that makes them: casts, slices of rows, soft cap, scale and bias on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import lax

from layers.rewriting.axes import flat, new_axes, spread_axes
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.walk import compact, is_product, with_number


@dataclass
class Head:
    """cap tanh(scale (x @ kernel + bias) / cap), rows of it.

    Attributes:
        x, kernel: the operands of the product.
        vocab_axis: of the kernel.
        at: the axis of the product that is the vocabulary.
        features_axis: of x.
        scale, bias_scale: what the product, and the bias, are multiplied by in all.
        cap: the soft cap; None for none.
        bias: of the classes; or None.
        moves: what lays out or cuts the rows afterwards, in order.
        nodes: all operations from the product to the logits.
    """

    x: Value
    kernel: Value
    vocab_axis: int
    at: int
    features_axis: int
    scale: float = 1.0
    bias_scale: float = 1.0
    cap: float | None = None
    bias: Value | None = None
    moves: list[Node] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)

    @property
    def inputs(self) -> list[Value]:
        return [self.x, self.kernel, *([self.bias] if self.bias is not None else [])]

    @property
    def keeps(self) -> int:
        """The float32 gradients that the loss keeps where it computes them in forward."""
        return 4 * (self.x.size + self.kernel.size)

    def arguments(self, x: Any, kernel: Any, bias: Any = None) -> tuple[Any, Any, Any]:
        """Rows of features in the layout of the logits, the kernel (features, vocab), and the bias, as the losses want them."""
        at = self.at
        x = jnp.moveaxis(x, self.features_axis, at)
        for n in self.moves:
            x, at = _move(n, x, at), _after(n, at)
        kernel = kernel if self.vocab_axis == 1 else kernel.T
        x = x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)
        bias = bias if bias is None or self.bias_scale == 1 else bias * jnp.asarray(self.bias_scale, bias.dtype)
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        return x.astype(dtype), kernel.astype(dtype), bias


def _after(n: Node, at: int) -> int:
    """Where the vocabulary is after a move."""
    if n.name == "transpose":
        return list(n.params["permutation"]).index(at)
    return n.out.ndim - 1 if n.name != "slice" else at


def _before(n: Node, at: int) -> int | None:
    """Where the vocabulary is before a move, given where it is after; None where the move goes across it."""
    x, p = n.inputs[0], n.params
    if n.name == "transpose":
        return p["permutation"][at]
    if n.name == "slice":
        whole = p["start_indices"][at] == 0 and p["limit_indices"][at] == x.shape[at] and (p["strides"] is None or p["strides"][at] == 1)
        return at if whole else None
    last = at == n.out.ndim - 1 and x.ndim and x.shape[-1] == n.out.shape[-1] and p.get("dimensions") is None
    return x.ndim - 1 if last else None


def _move(n: Node, x: Any, at: int) -> Any:
    """A move of logits, of rows of features on the axis of the vocabulary in their place."""
    p = n.params
    if n.name == "transpose":
        return jnp.transpose(x, p["permutation"])
    if n.name == "slice":
        limits = [m if i == at else stop for i, (m, stop) in enumerate(zip(x.shape, p["limit_indices"], strict=True))]
        return lax.slice(x, p["start_indices"], limits, p["strides"])
    return x.reshape(*n.out.shape[:-1], x.shape[at])


def find_head(z: Value, is_inside: Callable[[Node], bool]) -> Head | None:
    """The linear map that logits (vocabulary last) come from, where nothing but what is inside reads what is between; or None."""
    walk, v = _Walk(at=z.ndim - 1), z
    while v.node is not None and not v.kept and all(is_inside(u) or u in walk.nodes for u in v.users):
        if v.node.name == "dot_general":
            return walk.head(v.node)
        below = walk.step(v.node)
        if below is None:
            return None
        v = below
    return None


@dataclass
class _Walk:
    """What was passed on the way from the logits, which are cap tanh(scale / cap (...)) of what is below."""

    at: int
    scale: float = 1.0
    bias_scale: float = 1.0
    cap: float | None = None
    in_tanh: bool = False
    bias: Value | None = None
    moves: list[Node] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)

    def step(self, n: Node) -> Value | None:
        """The operand of `n` to go on with; None where the way ends."""
        self.nodes.add(n)
        if n.name in ("mul", "div"):
            return self._factor(n)
        if n.name == "tanh" and self.cap is not None and not self.in_tanh:
            self.in_tanh, self.scale = True, self.cap
            return n.inputs[0]
        if n.name == "add" and self.bias is None and (found := _bias(n, self.at)) is not None:
            self.bias, self.bias_scale = found[0], self.scale
            return found[1]
        if n.name in ("slice", "reshape", "transpose") and (before := _before(n, self.at)) is not None:
            self.at = before
            self.moves.append(n)
            return n.inputs[0]
        return n.inputs[0] if widens(n) and n.inputs[0].dtype.itemsize <= n.out.dtype.itemsize else None

    def _factor(self, n: Node) -> Value | None:
        found = with_number(n)
        if found is None or not found[0] or (n.name == "div" and n.inputs[0] is not found[1]):
            return None
        number, below = found
        number = number if n.name == "mul" else 1 / number
        if self.cap is None and self.scale == 1 and self.bias is None and below.node is not None and below.node.name == "tanh":
            self.cap = number
        else:
            self.scale *= number
        return below

    def head(self, n: Node) -> Head | None:
        found = _product(n, self.at)
        if found is None or (self.cap is not None and (not self.in_tanh or self.cap <= 0)):
            return None
        found.scale, found.bias_scale, found.cap, found.bias = self.scale, self.bias_scale, self.cap, self.bias
        found.moves, found.nodes = self.moves[::-1], self.nodes | {n}
        return found


def _bias(n: Node, at: int) -> tuple[Value, Value] | None:
    """(the vector of classes, the other operand) of a sum."""
    axes = new_axes(n.out.shape)
    for i in (1, 0):
        spread = spread_axes(n.inputs[i], n.out, axes)
        if spread is None or n.inputs[1 - i].shape != n.out.shape:
            continue
        base, own = compact(n.inputs[i], spread, set())
        if base.ndim == 1 and flat(own) == flat([axes[at]]):
            return base, n.inputs[1 - i]
    return None


def _product(n: Node, at: int) -> Head | None:
    """The operands of a product of rows and a kernel, where its axis `at` is the kernel's."""
    (lc, rc), (lb, _) = n.params["dimension_numbers"]
    if lb or len(lc) != 1 or not is_product(n):
        return None
    a, b = n.inputs
    if at == n.out.ndim - 1 and b.ndim == 2:
        return Head(a, b, 1 - rc[0], at, lc[0])
    if at == 0 and a.ndim == 2:
        return Head(b, a, 1 - lc[0], at, rc[0])
    return None
