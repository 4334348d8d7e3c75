"""Dropout of the weights of attention: what was drawn at random, and is passed on as it is.

mask ? w / keep : 0,    w m,  m = mask / keep  with the mask as a number,    in any order of factors
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from layers.rewriting.axes import Axis, spread_axes
from layers.rewriting.constants import number_of
from layers.rewriting.graph import Node, Value
from layers.rewriting.match import given, need
from layers.rewriting.walk import compact

CHANGED = "the weights are changed before the product with the values, not by a mask of 0 and 1 and a number"


@dataclass
class Dropout:
    """What the weights are multiplied by: a factor, where a mask says so.

    Attributes:
        value, axes: the mask, None where there is none, and its axes.
        inverted: whether True is what is dropped.
        factor: of the weights that are left.
    """

    value: Value | None = None
    axes: list[Axis] | None = None
    inverted: bool = False
    factor: float = 1.0

    def take(self, u: Node, weights: Value, axes: list[Axis]) -> None:
        """Takes one operation on the weights, which have these axes."""
        i = u.inputs.index(weights)
        if u.name == "select_n":
            need(len(u.inputs) == 3 and i > 0 and number_of(u.inputs[3 - i]) == 0, CHANGED)
            self._mask(u.inputs[0], u, axes, inverted=i == 1)
        elif (number := number_of(u.inputs[1 - i])) is not None and (i == 0 or u.name == "mul"):
            self._scale(u.name, number)
        else:
            need(u.name == "mul", CHANGED)
            self._multiplier(u.inputs[1 - i], u, axes)

    def finish(self) -> None:
        need(self.value is not None or self.factor == 1, CHANGED)
        need(self.factor >= 1, "the weights that are left after dropout are made smaller")

    @property
    def rate(self) -> float:
        return 1 - 1 / self.factor

    def _scale(self, name: str, number: float) -> None:
        need(number > 0, CHANGED)
        self.factor *= number if name == "mul" else 1 / number

    def _multiplier(self, m: Value, u: Node, axes: list[Axis]) -> None:
        """A mask as a number, with factors."""
        axes = given(spread_axes(m, u.out, axes), CHANGED)
        while True:
            m, axes = compact(m, axes, set())
            n = m.node
            if m.dtype == jnp.bool_ or n is None:
                break
            if n.name == "convert_element_type":
                m = n.inputs[0]
            elif n.name == "select_n" and len(n.inputs) == 3 and (numbers := [number_of(x) for x in n.inputs[1:]]).count(0) == 1:
                need(None not in numbers, CHANGED)
                self._scale("mul", max(numbers))
                self._mask(n.inputs[0], n, axes, inverted=numbers[1] == 0)
                return
            elif n.name in ("mul", "div") and (number := number_of(n.inputs[1])) is not None:
                self._scale(n.name, number)
                m = n.inputs[0]
            else:
                break
        self._mask(m, None, axes, inverted=False)

    def _mask(self, mask: Value, u: Node | None, axes: list[Axis], *, inverted: bool) -> None:
        need(self.value is None and mask.dtype == jnp.bool_, CHANGED)
        axes = axes if u is None else given(spread_axes(mask, u.out, axes), CHANGED)
        self.value, self.axes = compact(mask, axes, set())
        self.inverted = inverted
