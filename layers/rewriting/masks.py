"""Masks of attention: which of them is causal or a window, and what is left to be passed on."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from layers.rewriting.axes import Atom, Axis, NoPlace, arrange, back_through, length, spread_axes
from layers.rewriting.constants import array_of, is_static
from layers.rewriting.graph import Value
from layers.rewriting.primitives import LAYOUT


class Mask(NamedTuple):
    """Where a score is left.

    Attributes:
        value: booleans, or None where `array` holds them.
        axes: those of the value.
        low: the number that hidden scores become; None where it is added to them.
        inverted: whether False is what is left.
        array: the mask, where it is known.
    """

    value: Value | None
    axes: list[Axis]
    low: float | None
    inverted: bool = False
    array: np.ndarray | None = None


def conjuncts(m: Mask) -> list[Mask]:
    """The masks that one is the conjunction of, each before it was broadcast."""
    v = m.value
    if v is None or v.node is None:
        return [m]
    n = v.node
    if n.name in LAYOUT and (back := back_through(n, m.axes)) is not None:
        return conjuncts(m._replace(value=n.inputs[0], axes=back))
    if n.name == "and" and n.inputs[0].dtype == jnp.bool_ and not m.inverted and not is_static(v):
        axes = [spread_axes(x, n.out, m.axes) for x in n.inputs]
        if all(a is not None for a in axes):
            return [c for x, a in zip(n.inputs, axes, strict=True) for c in conjuncts(m._replace(value=x, axes=a))]
    return [m]


class Band(NamedTuple):
    """The least and greatest position of a key less that of the query; None for no bound."""

    low: int | None = None
    high: int | None = None

    def within(self, other: Band) -> Band:
        lows, highs = ([x for x in pair if x is not None] for pair in zip(self, other, strict=True))
        return Band(max(lows, default=None), min(highs, default=None))

    @property
    def is_causal(self) -> bool:
        return self.high == 0

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """As `local_window_size`."""
        if self.low is None and self.high in (None, 0):
            return None
        return None if self.low is None else -self.low, self.high

    def __str__(self) -> str:
        return ", causal" * self.is_causal + f", window {self.window}" * (self.window is not None)


def band_of(mask: np.ndarray) -> Band | None:
    """The bounds of which a (queries, keys) mask is made, where it is and every query sees a key; or None."""
    t, s = mask.shape
    if not mask.any(1).all():
        return None
    d = np.arange(s)[None] - np.arange(t)[:, None]
    low, high = int(d[mask].min()), int(d[mask].max())
    if not ((d >= low) & (d <= high) == mask).all():
        return None
    band = Band(low if low > 1 - t else None, high if high < s - 1 else None)
    fits = (band.low is None or band.low <= 0) and (band.high is None or band.high >= 0)
    return band if fits else None


def static_band(m: Mask, batch: list[Atom], heads: list[Atom], queries: list[Atom], keys: list[Atom]) -> Band | None:
    """The bounds that a mask known now stands for; or None."""
    array = m.array if m.array is not None else array_of(m.value) if m.value is not None and is_static(m.value) else None
    if array is None:
        return None
    try:
        whole = arrange(array, m.axes, [batch, heads, queries, keys], np)
    except NoPlace:
        return None
    if not (whole == whole[:1, :1]).all():
        return None
    plane = np.broadcast_to(whole[0, 0], (length(queries), length(keys)))
    return band_of(plane != m.inverted)
