"""The kernels of the cross entropy of logits, and what they are told of a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax

from layers.kernels import mosaic_cross_entropy
from layers.kernels.dispatch import Kernel
from layers.kernels.mosaic import refuse_place
from layers.kernels.place import Place
from layers.kernels.trial import failure_of

LONG = 1024
"""The number of classes from which on a row is long."""


@dataclass(frozen=True)
class CrossEntropyCall:
    """What is known of a call when it is traced.

    Attributes:
        logits: the shape, (rows, vocab).
        dtype: of the logits.
        needs: what goes through all classes beside the maximum, the sum of exp and their gradient.
        varies: whether the arrays are known to differ along manual axes of a mesh (`shard_map(check_vma=True)`).
        mesh: "automatic" or "explicit" where the arrays may lie along such axes of a mesh.
    """

    logits: tuple[int, ...]
    dtype: str
    needs: tuple[str, ...] = ()
    varies: bool = False
    mesh: str = ""

    @property
    def sized(self) -> bool:
        """Whether every length is a number above 0, not a symbol (`jax.export`)."""
        return all(isinstance(n, int) and n > 0 for n in self.logits)

    @property
    def shape_class(self) -> str:
        """What a verification of one such call says of others."""
        size = "unsized" if not self.sized else "long rows" if self.logits[1] >= LONG else "short rows"
        return f"{', '.join(self.needs) or 'plain'}, {size}"


def _refuse(call: CrossEntropyCall, place: Place) -> str | None:
    if not call.sized:
        return "a length is symbolic or 0"
    if call.needs:
        return f"it has no {', no '.join(call.needs)}"
    least = mosaic_cross_entropy.LEAST
    if call.logits[1] < least:
        return f"it takes at least {least} classes, but these are {call.logits[1]}"
    if call.logits[0] * call.logits[1] >= 2**31:
        return f"it counts elements in 32 bits, but there are {call.logits[0]} x {call.logits[1]}"
    return refuse_place(place, call.dtype, call.varies, call.mesh)


@functools.cache
def _fails() -> str | None:
    return failure_of(mosaic_cross_entropy.forward, jax.ShapeDtypeStruct((2, 256), "bfloat16"))


KERNELS = {"mosaic": Kernel("mosaic", _refuse, mosaic_cross_entropy.forward, mosaic_cross_entropy.backward, fails=_fails)}
