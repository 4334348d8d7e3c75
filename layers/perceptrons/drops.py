"""The dropout between the two maps of a module: a `flax.nnx.Dropout` that holds its rate and random stream, and is never called."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.nnx import rnglib
from flax.nnx.module import first_from

from layers.core import checks


def module(who: str, rate: Any, deterministic: Any, rngs: Any) -> nnx.Dropout | None:
    """One of this rate; None where it is 0, which takes nothing from a stream."""
    rate = checks.number(who, "dropout_rate", rate, "[0, 1]")
    deterministic = checks.flag(who, "deterministic", deterministic, optional=True)
    return nnx.Dropout(rate, deterministic=deterministic, rngs=rngs) if rate else None


def rate_and_key(who: str, dropout: nnx.Dropout | None, deterministic: Any, rngs: Any) -> tuple[float, Any]:
    """What a call drops: the rate, 0 for nothing, and the key."""
    deterministic = checks.flag(who, "deterministic", deterministic, optional=True)
    if dropout is None:
        return 0.0, None
    missing = f"{who}: deterministic is None here and in the constructor, but must be True or False in one of them: deterministic=False drops"
    if first_from(deterministic, dropout.deterministic, error_msg=missing):
        return 0.0, None
    rngs = first_from(rngs, dropout.rngs, error_msg=f"{who}: rngs is None, but where something is dropped must be given: nnx.Rngs(seed)")
    if isinstance(rngs, rnglib.Rngs):
        return dropout.rate, rngs[dropout.rng_collection]()
    return dropout.rate, rngs() if isinstance(rngs, rnglib.RngStream) else rngs
