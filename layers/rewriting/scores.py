"""From a product of queries and keys to the scores that a softmax is taken of: scale, soft cap, biases, masks and sinks, in the order they come.

    s = cap tanh(scale q kᵀ / cap) + bias,   hidden scores become a large negative number,   a sink is one more column

A mask is a selection; or an addition of 0 and of large negative numbers; or a product with 0 and 1, together with such an addition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from layers.rewriting.axes import Axis, flat, spread_axes, through
from layers.rewriting.constants import array_of, is_static, number_of
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.masks import Mask
from layers.rewriting.match import given, need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.walk import compact

DEPTH = 32
LOW = -1e8
"""From where on a number hides scores: exp of it is 0 whatever the others are. In float16, which ends before, from 0.4 of its least number on."""


class Step(NamedTuple):
    node: Node
    followed: int


class Term(NamedTuple):
    """What is added to the scores, with its axes."""

    value: Value
    axes: list[Axis]
    negative: bool = False


def find_product(v: Value, depth: int = 0) -> tuple[Node, list[Step]] | None:
    """The product of matrices that scores come from, and the steps from there; or None."""
    n = v.node
    if n is None or depth > DEPTH:
        return None
    if n.name == "dot_general":
        return n, []
    for i in _ways_back(n):
        x = n.inputs[i]
        if not is_static(x) and (x.size == v.size or n.name == "concatenate"):
            found = find_product(x, depth + 1)
            if found is not None:
                return found[0], [*found[1], Step(n, i)]
    return None


def _ways_back(n: Node) -> tuple[int, ...]:
    if n.name in LAYOUT or widens(n) or n.name == "tanh":
        return (0,)
    if n.name in ("mul", "add"):
        return (0, 1)
    if n.name in ("div", "sub") or (n.name == "concatenate" and len(n.inputs) == 2):
        return (0,)
    return (1, 2) if n.name == "select_n" and len(n.inputs) == 3 else ()


@dataclass
class Scores:
    """What the steps from the product to the scores do."""

    axes: list[Axis]
    scale: float = 1.0
    cap: float | None = None
    masks: list[Mask] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sink: Term | None = None
    nodes: set[Node] = field(default_factory=set)
    inside_tanh: bool = False
    multiplied: tuple[np.ndarray, list[Axis]] | None = None

    def take(self, step: Step) -> None:
        n, i = step
        self.nodes.add(n)
        need(self.sink is None or widens(n), "the scores are changed after a sink was appended")
        if n.name in ("mul", "div"):
            self._factor(n, n.inputs[1 - i])
        elif n.name == "tanh":
            need(not (self.inside_tanh or self.cap or self.masks or self.terms), "a tanh of scores that were masked or capped")
            self.inside_tanh = True
        elif n.name in ("add", "sub"):
            self._term(n, n.inputs[1 - i])
        elif n.name == "select_n":
            self._select(n, i)
        elif n.name == "concatenate":
            self._sink(n)
        if n.name in LAYOUT:
            self.axes = given(through(n, self.axes), "the axes of the scores are lost in a reshape")

    def finish(self) -> None:
        need(not self.inside_tanh, "a tanh of scores without the soft cap's factor")
        need(self.multiplied is None, "a product with a mask that nothing is added to")
        need(self.cap is None or self.cap > 0, "a soft cap that is not above 0")

    def _factor(self, n: Node, other: Value) -> None:
        number = number_of(other)
        if number is None:
            self._multiply(n, other)
            return
        need(not self.masks and not self.terms, "a factor after the mask or bias")
        need(number != 0 and np.isfinite(number), "a factor that is 0 or not finite")
        number = number if n.name == "mul" else 1 / number
        if self.inside_tanh:
            self.cap, self.scale, self.inside_tanh = number, self.scale * number, False
        else:
            need(self.cap is None, "a factor after the soft cap")
            self.scale *= number

    def _multiply(self, n: Node, other: Value) -> None:
        spread = spread_axes(other, n.out, self.axes)
        value, axes = compact(other, spread, set()) if spread is not None else (other, None)
        mask = array_of(value) if n.name == "mul" and is_static(value) else None
        reason = "the scores are multiplied by an array that is no number and no known mask of 0 and 1"
        mask, axes = given(mask, reason), given(axes, reason)
        need(not self.inside_tanh and self.multiplied is None and np.isin(mask, (0, 1)).all(), reason)
        self.multiplied = mask, axes

    def _term(self, n: Node, other: Value) -> None:
        need(not self.inside_tanh, "a term inside the soft cap's tanh")
        need(number_of(other) is None, "a number is added to the scores")
        spread = given(spread_axes(other, n.out, self.axes), "a bias of other axes")
        value, axes = compact(other, spread, set())
        array = array_of(value) if is_static(value) else None
        if array is not None and self._additive_mask(-array if n.name == "sub" else array, axes):
            return
        need(self.multiplied is None, "a product with a mask, and then a bias that does not hide where it is 0")
        need(not self.masks, "a bias after the mask")
        self.terms.append(Term(value, axes, n.name == "sub"))

    def _additive_mask(self, term: np.ndarray, axes: list[Axis]) -> bool:
        """Takes an array of 0 and of large negative numbers as the mask that it is."""
        least = float(jnp.finfo(term.dtype).min) if jnp.issubdtype(term.dtype, jnp.floating) else LOW
        term = term.astype(np.float64)
        hidden = (term <= LOW) | (term <= 0.4 * least)
        if not (hidden | (term == 0)).all():
            return False
        if self.multiplied is not None:
            left, left_axes = self.multiplied
            if flat(left_axes) != flat(axes) or not ((left.ravel() == 1) == ~hidden.ravel()).all():
                return False
            self.multiplied = None
            low = float(term.min())
        else:
            low = None  # of a row that is hidden everywhere the scores count still
        self.masks.append(Mask(None, axes, low, array=~hidden))
        return True

    def _select(self, n: Node, i: int) -> None:
        need(not self.inside_tanh and self.multiplied is None, "a mask inside the soft cap")
        low = number_of(n.inputs[3 - i])
        lowest = float(jnp.finfo(n.out.dtype).min)
        need(low is not None, "hidden scores become something that is not one number")
        need(low <= LOW or low <= 0.4 * lowest, f"hidden scores become {low:g}, which does not hide them")
        axes = self.axes if n.inputs[0].ndim else []
        self.masks.append(Mask(n.inputs[0], axes, float(low), inverted=i == 1))

    def _sink(self, n: Node) -> None:
        axis = n.params["dimension"]
        column = n.inputs[1]
        need(column.shape[axis] == 1 and self.sink is None, "the scores are part of a larger array")
        axes = [a if i != axis else [] for i, a in enumerate(self.axes)]
        self.sink = Term(*compact(column, axes, set()))
