"""The kernels of the selective scan, and what they are told of a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax

from layers.kernels import mosaic_selective_scan
from layers.kernels.dispatch import Kernel
from layers.kernels.mosaic import LANES, refuse_place
from layers.kernels.mosaic_selective_scan import CHUNK, STATES
from layers.kernels.place import Place
from layers.kernels.trial import failure_of

LONG = 1024
"""The number of steps from which on a sequence is long."""


@dataclass(frozen=True)
class ScanCall:
    """What is known of a call when it is traced.

    Attributes:
        u: the shape of the inputs, (batch, time, features).
        dtype: of the inputs.
        states: of each feature.
        gate, segments: whether there are such.
        varies: whether the arrays are known to differ along manual axes of a mesh (`shard_map(check_vma=True)`).
        mesh: "automatic" or "explicit" where the arrays may lie along such axes of a mesh.
    """

    u: tuple[int, ...]
    dtype: str
    states: int
    gate: bool = False
    segments: bool = False
    varies: bool = False
    mesh: str = ""

    @property
    def sized(self) -> bool:
        """Whether every length is a number above 0, not a symbol (`jax.export`)."""
        return all(isinstance(n, int) and n > 0 for n in (*self.u, self.states))

    @property
    def shape_class(self) -> str:
        """What a verification of one such call says of others."""
        size = "unsized" if not self.sized else "long" if self.u[1] >= LONG else "short"
        return f"{self.states} states, {size}"


def _refuse(call: ScanCall, place: Place) -> str | None:
    if not call.sized:
        return "a length is symbolic or 0"
    batch, time, features = call.u
    reasons = {
        "it has no gate: multiply the output by silu(z)": call.gate,
        "it has no packed sequences": call.segments,
        f"it takes {', '.join(map(str, STATES))} states, but these are {call.states}": call.states not in STATES,
        f"it takes multiples of {LANES} features, but these are {features}": bool(features % LANES),
        f"it takes multiples of {CHUNK} steps, but these are {time}": bool(time % CHUNK),
        f"it counts elements in 32 bits, but there are {batch} x {time} x {features}": batch * time * features >= 2**31,
    }
    refused = next((reason for reason, holds in reasons.items() if holds), None)
    return refused or refuse_place(place, call.dtype, call.varies, call.mesh)


@functools.cache
def _fails() -> str | None:
    of = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    u, b = of(1, CHUNK, LANES), of(1, CHUNK, STATES[0])
    return failure_of(mosaic_selective_scan.forward, u, u, of(STATES[0], LANES), b, b, of(LANES), of(1, STATES[0], LANES))


KERNELS = {"mosaic": Kernel("mosaic", _refuse, mosaic_selective_scan.forward, mosaic_selective_scan.backward, fails=_fails)}
