"""Linen classes of nnx modules that own arrays."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.core import FrozenDict

_OF_LINEN = ("nnx_class", "args", "kwargs", "skip_rng", "metadata_fn", "parent", "name")


def derive(module: type[nnx.Module]) -> Any:
    """The Linen class that takes the arguments of the nnx `module`, but for `rngs`, and Linen's `name`."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own: dict[str, Any] = {"nnx_class": module, "args": args, **{k: kwargs.pop(k) for k in _OF_LINEN if k in kwargs}}
        own["kwargs"] = FrozenDict({**own.get("kwargs", {}), **kwargs})
        nnx.bridge.ToLinen.__init__(self, **own)

    class Derived(nnx.bridge.ToLinen):
        def __init_subclass__(cls, **kwargs: Any) -> None:  # what `linen.remat` and the like make of the class takes the same arguments
            super().__init_subclass__(**kwargs)
            cls.__init__ = __init__

    return type(module.__name__, (Derived,), {"__doc__": module.__doc__, "__module__": "layers.linen"})
