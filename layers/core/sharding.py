"""How arrays lie on devices: what rules ask before they move data, and what loops start from."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def on_one_device(*arrays: jax.Array) -> bool:
    """Whether each device has all of these arrays, or under `shard_map` all of its own part."""
    meshes = [*(jax.typeof(x).sharding.mesh for x in arrays), jax.sharding.get_abstract_mesh()]
    return all(kind == AxisType.Manual for mesh in meshes for kind in mesh.axis_types)


def mesh_of(*arrays: jax.Array) -> str:
    """ "explicit" or "automatic" where these arrays may lie along such axes of a mesh, else ""."""
    kinds = {kind for x in arrays for kind in jax.typeof(x).sharding.mesh.axis_types} | {*jax.sharding.get_abstract_mesh().axis_types}
    return "explicit" if AxisType.Explicit in kinds else "automatic" if AxisType.Auto in kinds else ""


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """How `x` lies along explicit axes of a mesh; None where there are none."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def sharded_as(made: jax.Array, x: jax.Array) -> jax.Array:
    """`made`, what a loop starts from, with its axes along explicit axes of a mesh as the first ones of `x` are."""
    like = explicit_sharding(x)
    return made if like is None else jax.sharding.reshard(made, NamedSharding(like.mesh, P(*like.spec[: made.ndim])))
