"""The nnx layers of this library, called with what a Linen module of Flax's fields holds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax
from flax import linen, nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes


def twin(kind: type[nnx.Module], module: linen.Module, **own: Any) -> Any:
    """An nnx layer that has the fields of `module` and the attributes `own`, arrays among them as parameters; its constructor is not called."""
    held = {f.name: getattr(module, f.name) for f in fields(module) if f.name not in ("parent", "name")}
    made = object.__new__(kind)
    for name, value in {**held, "promote_dtype": _promotion(module), **own}.items():
        object.__setattr__(made, name, nnx.Param(value) if isinstance(value, jax.Array) else value)
    return made


def _promotion(module: Any) -> Any:
    """A module's `promote_dtype`, which takes arrays one by one in Linen and as a tuple in nnx."""
    promote = getattr(module, "promote_dtype", linen_dtypes.promote_dtype)
    if promote is linen_dtypes.promote_dtype:
        return dtypes.promote_dtype
    return lambda values, **options: promote(*values, **options)
