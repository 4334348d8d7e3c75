"""Which way a call is computed: by XLA, which can do all of them, or by a kernel.

What can do a call is decided from its shapes, dtypes and options and from what it is compiled for, never from values or from what ran before.
Not asked for, the first kernel is taken that can do the call and was verified for it; asked for, a kernel that cannot raises with the reason.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from layers.core import machine
from layers.kernels import verified
from layers.kernels.place import Place, here

XLA = "xla"
NAMES = (XLA, "cudnn", "mosaic", "tokamax")

NEVER = {
    (
        "dot_product_attention",
        "tokamax",
    ): "its public function gives no logsumexp, which sinks and this layer's gradient need: computing it again, and "
    "its forward pass for its own gradient, would be two passes more over the keys. Call tokamax itself where its options are enough",
}
"""By layer and name, ways that a user may look for and why no call takes them."""


class Call(Protocol):
    """What is known of a call when it is traced."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape_class(self) -> str: ...

    @property
    def mesh(self) -> str:
        """ "" for one device, or each device's own part; "automatic" or "explicit" for axes of a mesh that its arrays may lie along."""
        ...


@dataclass(frozen=True)
class Kernel:
    """One way to compute a layer beside XLA's.

    Attributes:
        name: one of `NAMES`.
        refuse: `(call, place)` to the reason why it cannot do the call there, or None.
        forward, backward: the kernel.
        takes_backward: `(call, place, wants)` to whether `backward` can give what is wanted; where it cannot, XLA does.
        fails: why it does not work on this machine, tried once; None where it does.
    """

    name: str
    refuse: Callable[[Any, Place], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    takes_backward: Callable[..., bool] = lambda *_call_and_place, **_wants: True
    fails: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Decision:
    """Which way a call goes, and the reason against each other one that there is."""

    layer: str
    call: Call
    chosen: str
    against: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Recorder:
    """The decisions that are made while it is asked."""

    decisions: list[Decision] = field(default_factory=list)


_recorder: Any = jax.make_user_context(None)  # part of the key of JAX's caches: what was traced before is decided anew


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Records the decisions that are made inside."""
    recorder = Recorder()
    with _recorder(recorder):
        yield recorder


def decide(layer: str, call: Call, kernels: Mapping[str, Kernel], place: Place, asked: str | None = None) -> Decision:
    """Which of the kernels, or XLA, computes a call: a function of its arguments and of the table of what was verified."""
    against = {name: kernel.refuse(call, place) for name, kernel in kernels.items()}
    against |= {name: reason for (of, name), reason in NEVER.items() if of == layer}
    if asked not in (None, XLA):
        reason = against.get(asked, f"there is no such kernel of {layer}: {', '.join((XLA, *kernels))}")
        if reason is not None:
            raise ValueError(f"{layer}: implementation is {asked!r}, which cannot do this call: {reason}. Use implementation='xla', or None")
        chosen = asked
    else:
        for name, reason in against.items():
            against[name] = reason or _why_not_unasked(layer, name, call, place)
        chosen = next((name for name, reason in against.items() if reason is None), XLA) if asked is None else XLA
    others = {name: reason or f"{chosen} goes before it" if asked is None else f"{asked} is asked for" for name, reason in against.items()}
    others = {name: reason for name, reason in others.items() if name != chosen}
    if chosen != XLA:
        others[XLA] = f"{chosen} was verified to be faster" if asked is None else f"{asked} is asked for"
    return Decision(layer, call, chosen, others)


def _why_not_unasked(layer: str, name: str, call: Call, place: Place) -> str | None:
    if call.mesh:
        return "its arrays may lie on several devices: use shard_map, or ask for it"
    return verified.why_not(layer, name, call.dtype, call.shape_class, place)


def choose(layer: str, call: Call, kernels: Mapping[str, Kernel], asked: str | None) -> str:
    """The name of the way that this call takes.

    Raises:
        ValueError: where a kernel is asked for that cannot do the call.
    """
    decision = _if_it_works(decide(layer, call, kernels, here(), asked), kernels, asked)
    if _recorder.value is not None:
        _recorder.value.decisions.append(decision)
    return decision.chosen


def _if_it_works(decision: Decision, kernels: Mapping[str, Kernel], asked: str | None) -> Decision:
    """The decision, or that for XLA where the kernel does not work on this machine; what is compiled for another one is not tried."""
    if decision.chosen == XLA or machine.is_asked_for():
        return decision
    name, failure = decision.chosen, kernels[decision.chosen].fails()
    if failure is None:
        return decision
    if asked is not None:
        raise ValueError(f"{decision.layer}: implementation is {asked!r}, which does not work on this machine: {failure}")
    warnings.warn(f"{decision.layer}: {name} does not work on this machine, so XLA computes it: {failure}", RuntimeWarning, stacklevel=2)
    others = {key: reason for key, reason in decision.against.items() if key != XLA}
    return Decision(decision.layer, decision.call, XLA, others | {name: f"it does not work on this machine: {failure}"})
