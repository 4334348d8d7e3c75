"""A chain of couplings over flat lists of arrays: forwards, and backwards from its result.

Forward    y1 = x1 + f(x2),           y2 = x2 + g(y1)
Undone     x2 = y2 - g(y1),           x1 = y1 - f(x2)
Backward   dx1 = dy1 + dy2 g'(y1),    dx2 = dy2 + dx1 f'(x2)
           and for the arrays a of each  da_g = dy2 ∂g/∂a (y1),  da_f = dx1 ∂f/∂a (x2)

f' multiplies dx1, not dy1: y1 reaches the loss through y2 too. To undo a coupling takes g(y1) and f(x2), which are where its derivatives are taken:
they are computed once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.trees import is_inexact, replaced
from layers.reversible.placement import once_as, varying_as
from layers.reversible.streams import Streams

Values = dict[int, Any]
"""Arrays by their index in the list of those of the chain."""


class StreamPair(NamedTuple):
    """The two streams, or their gradients."""

    first: Any
    second: Any


class Advanced(NamedTuple):
    """What `Chain.advance` returns.

    Attributes:
        y: the streams at the end.
        seen: for each half the values it saw of the state that had been changed before.
        changed: the state as it is at the end.
    """

    y: StreamPair
    seen: Any
    changed: Values


class Retreated(NamedTuple):
    """What `Chain.retreat` returns.

    Attributes:
        x: the streams at the start.
        dx: their gradients; None where none were asked for.
        arrays: a gradient or None for each array.
    """

    x: StreamPair
    dx: StreamPair | None
    arrays: list[Any]


class Undone(NamedTuple):
    """One half undone: the stream without its output, the gradient of the stream that it reads, and those of its arrays."""

    stream: Any
    gradient: Any
    arrays: Values


@dataclass(frozen=True, eq=False)
class Half:
    """One of the two functions of a coupling.

    Attributes:
        call: `(arrays, x) -> (output, arrays afterwards)`. An array that is not the very same afterwards is state that the call changed.
        indices: where its arrays are in the list of those of the chain.
        name: for messages.
    """

    call: Callable[[list[Any], Any], tuple[Any, list[Any]]]
    indices: tuple[int, ...]
    name: str


@dataclass(frozen=True, eq=False)
class Chain:
    """Couplings one after the other.

    Attributes:
        couplings: pairs of f and g; a single pair if `length` is given.
        streams: the arithmetic between them.
        stacked: how many of the arrays, from the first on, have an axis 0 of length `length`, one entry a coupling.
        length: the number of couplings of a chain that is a loop; None for one that is unrolled.
        dtypes: those in which the first and the second stream are given to a half; None for that of the stream.
    """

    couplings: tuple[tuple[Half, Half], ...]
    streams: Streams
    stacked: int = 0
    length: int | None = None
    dtypes: tuple[Any, Any] | None = None

    def advance(self, arrays: Sequence[Any], x: StreamPair) -> Advanced:
        """Runs the couplings on the streams `x`."""
        if self.length is None:
            values, seen = list(arrays), []
            for pair in self.couplings:
                x, saw = self._couple(pair, values, arrays, x)
                seen.append(saw)
            return Advanced(x, seen, _changed(range(len(values)), values, arrays))
        if not self.length:
            return Advanced(x, ({}, {}), {})

        def body(carry: Any, stacked: list[Any]) -> tuple[Any, Any]:
            given = [*stacked, *arrays[self.stacked :]]
            values = list(given)
            x, saw = self._couple(self.couplings[0], values, given, carry)
            return x, (saw, _changed(range(len(values)), values, given))

        stacked = list(arrays[: self.stacked])
        carry = compat.vary_like(x, lambda c: body(c, [a[0] for a in stacked])[0], arrays)
        y, (seen, changed) = lax.scan(body, carry, stacked, self.length)
        return Advanced(y, seen, changed)

    def retreat(self, arrays: Sequence[Any], seen: Any, y: StreamPair, dy: StreamPair | None, dstate: Values, wanted: Sequence[bool]) -> Retreated:
        """Undoes `advance`.

        Args:
            arrays: those given to `advance`.
            seen: what `advance` returned as such.
            y: the two streams at the end.
            dy: their gradients; None to compute none.
            dstate: gradients of the state as it was at the end, where there are any.
            wanted: which of the arrays need a gradient.
        """
        if self.length is None:
            sums: Values = {}
            for pair, saw in zip(reversed(self.couplings), reversed(seen), strict=True):
                (y, values), dy = barrier((y, [varying_as(a, y) for a in arrays]), dy)
                y, dy, grads = self._uncouple(pair, values, saw, y, dy, dstate, wanted)
                _accumulate(sums, grads)
            return Retreated(y, dy, [sums.get(i) for i in range(len(arrays))])
        if not self.length:
            return Retreated(y, dy, [None] * len(arrays))
        shared = range(self.stacked, len(arrays))
        totals = {i: jnp.zeros(arrays[i].shape, wide(arrays[i].dtype)) for i in shared if dy is not None and wanted[i]}

        def body(carry: Any, given: Any) -> tuple[Any, Any]:
            (y, dy, totals), (stacked, saw, dstate) = carry, given
            y, dy, grads = self._uncouple(self.couplings[0], [*stacked, *arrays[self.stacked :]], saw, y, dy, dstate, wanted)
            totals = {i: t + grads[i] if i in grads else t for i, t in totals.items()}
            return (y, dy, totals), {i: g for i, g in grads.items() if i < self.stacked}

        stacked = [varying_as(a, y) for a in arrays[: self.stacked]]  # their gradients are summed over the mesh once, after the loop
        (y, stacked, seen), dy = barrier((y, stacked, seen), dy)
        given = (stacked, seen, dstate)
        carry = compat.vary_like((y, dy, totals), lambda c: body(c, jax.tree.map(lambda a: a[0], given))[0], arrays, dstate)
        (y, dy, totals), grads = lax.scan(body, carry, given, self.length, reverse=True)
        return Retreated(y, dy, [(totals | grads).get(i) for i in range(len(arrays))])

    def _couple(self, pair: tuple[Half, Half], values: list[Any], given: Sequence[Any], x: StreamPair) -> tuple[StreamPair, Any]:
        (f, g), (x1, x2) = pair, x
        before_f = _state_before(f, values, given)
        y1 = self.streams.add(x1, _run(f, values, self._as_input(self.streams.read(x2), 1)))
        before_g = _state_before(g, values, given)
        y2 = self.streams.add(x2, _run(g, values, self._as_input(self.streams.read(y1), 0)))
        return StreamPair(y1, y2), (before_f, before_g)

    def _uncouple(
        self, pair: tuple[Half, Half], values: list[Any], saw: Any, y: StreamPair, dy: StreamPair | None, dstate: Values, wanted: Sequence[bool]
    ) -> tuple[StreamPair, StreamPair | None, Values]:
        """The streams before a coupling, their gradients, and those of the arrays of both halves."""
        (f, g), (y1, y2), (dy1, dy2) = pair, y, dy or StreamPair(None, None)
        x2, dx1, grads = self._undo(g, 0, values, saw[1], read=y1, taken_from=y2, dread=dy1, dtaken=dy2, dstate=dstate, wanted=wanted)
        x1, dx2, more = self._undo(f, 1, values, saw[0], read=x2, taken_from=y1, dread=dy2, dtaken=dx1, dstate=dstate, wanted=wanted)
        _accumulate(grads, more)
        return StreamPair(x1, x2), None if dy is None else StreamPair(dx1, dx2), grads

    def _undo(
        self,
        half: Half,
        which: int,
        values: list[Any],
        saw: Values,
        *,
        read: Any,
        taken_from: Any,
        dread: Any,
        dtaken: Any,
        dstate: Values,
        wanted: Sequence[bool],
    ) -> Undone:
        """Takes the output of `half` from a stream; the one that it reads is stream number `which`.

        Args:
            read, taken_from: the two streams.
            dread, dtaken: their gradients, or None.
        """
        given = [saw.get(i, values[i]) for i in half.indices]
        point = self.streams.read(read)
        if dtaken is None:
            return Undone(self.streams.add(taken_from, half.call(given, self._as_input(point, which))[0], -1), None, {})
        differentiated = [k for k, i in enumerate(half.indices) if wanted[i] and i not in saw]

        def outputs(moved: list[Any], point: Any) -> tuple[Any, Values]:
            now = replaced(given, differentiated, moved)
            out, after = half.call(now, self._as_input(point, which))
            written = (k for k, i in enumerate(half.indices) if i in dstate and after[k] is not now[k])
            return out, {half.indices[k]: varying_as(after[k], dstate[half.indices[k]]) for k in written}

        (out, state), pull = jax.vjp(outputs, [given[k] for k in differentiated], point)
        moved_grads, dpoint = pull((dtaken.astype(out.dtype), {i: once_as(dstate[i], x) for i, x in state.items()}))
        summed: Values = {}
        for k, grad in zip(differentiated, moved_grads, strict=True):
            _accumulate(summed, {half.indices[k]: grad})
        return Undone(self.streams.add(taken_from, out, -1), dread + dpoint.astype(dread.dtype), summed)

    def _as_input(self, x: Any, which: int) -> Any:
        return x if self.dtypes is None else x.astype(self.dtypes[which])


def _run(half: Half, values: list[Any], x: Any) -> Any:
    """The output of `half`; the state that it changed is put into `values`."""
    out, after = half.call([values[i] for i in half.indices], x)
    for i, new in zip(half.indices, after, strict=True):
        values[i] = new
    return out


def _state_before(half: Half, values: Sequence[Any], given: Sequence[Any]) -> Values:
    """What others have changed of the arrays that `half` is about to read: counts of random streams, not what a gradient would go through."""
    changed = _changed(half.indices, values, given)
    if any(is_inexact(x) for x in changed.values()):
        raise TypeError(
            f"{half.name} reads floating-point state that an earlier block has changed in the same pass, and no gradient goes through it: "
            "give each block state of its own, or keep it from changing (use_running_average=True)"
        )
    return changed


def _changed(indices: Sequence[int], values: Sequence[Any], given: Sequence[Any]) -> Values:
    return {i: values[i] for i in indices if values[i] is not given[i]}


def _accumulate(sums: Values, grads: Values) -> None:
    for i, grad in grads.items():
        sums[i] = sums[i].astype(wide(grad.dtype)) + grad if i in sums else grad
