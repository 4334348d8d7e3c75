"""Over which mesh axes the values of a chain differ from device to device (`shard_map`)."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from layers.core import compat


def varying_as(x: Any, other: Any) -> Any:
    """`x` marked as varying over the mesh axes that `other`, an array or several, varies over (`shard_map`)."""
    missing = _missing_axes(x, other)
    return lax.pcast(x, missing, to="varying") if missing else x


def once_as(gradient: Any, x: Any) -> Any:
    """`gradient`, that of what is one value on all devices, as that of `x`, which is computed on each: it enters on one of them."""
    return compat.on_first_device(gradient, _missing_axes(gradient, x))


def _missing_axes(x: Any, other: Any) -> tuple[str, ...]:
    axes = frozenset().union(*(compat.varying_axes(jax.typeof(y)) for y in jax.tree.leaves(other)))
    return tuple(sorted(axes - compat.varying_axes(jax.typeof(x))))
