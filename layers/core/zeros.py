"""Zeros that XLA cannot write early.

What a loop starts from depends on nothing, so XLA's scheduler on the CPU writes the zeros of the backward loops of all layers first, and a
stack of n layers holds n of each at once. Made of an element of what the loop reads, they take their memory when its turn comes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def zero_after(x: jax.Array) -> Any:
    """A floating-point zero that XLA cannot tell from an element of `x`; a plain one where `x` is empty or may lie on several devices."""
    if x.size == 0 or not on_one_device(x):
        return 0.0
    first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    return jnp.where(first > 0, -0.0, 0.0)


def on_one_device(*arrays: jax.Array) -> bool:
    """Whether each device has all of these arrays, or under `shard_map` all of its own part."""
    meshes = [*(jax.typeof(x).sharding.mesh for x in arrays), jax.sharding.get_abstract_mesh()]
    return all(kind == AxisType.Manual for mesh in meshes for kind in mesh.axis_types)


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """How `x` lies along explicit axes of a mesh; None where there are none."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def lie_like(made: jax.Array, x: jax.Array) -> jax.Array:
    """`made`, what a loop starts from, with its axes along explicit axes of a mesh as the first ones of `x` are."""
    like = explicit_sharding(x)
    return made if like is None else jax.sharding.reshard(made, NamedSharding(like.mesh, P(*like.spec[: made.ndim])))
