"""Loops over blocks of rows, with a ragged last block: the only form in which XLA really frees what a block needed.

Where rows lie on several devices under `jax.jit`, one loop over all of them would gather them on every device. There they are split into lanes,
runs of rows that follow each other, one for each device of the mesh; the loops of all lanes are one (`jax.vmap`), and their sums are added after it.

Where the number of rows is symbolic (`jax.export`) there are no blocks, whatever their size was to be: all rows are one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.core import compat


def block_size(length: int, target: int, asked: int | None = None) -> int:
    """The size of the blocks for `length` rows: `asked`, if given; else the largest divisor of `length` in (target / 2, target], else `target`."""
    if is_symbolic_dim(length):
        return cast(int, length)
    if asked is not None:
        return min(asked, max(length, 1))
    if length <= target:
        return max(length, 1)
    divisors = (b for b in range(target, target // 2, -1) if length % b == 0)
    return next(divisors, target)


def scan_blocks(body: Callable[..., tuple[Any, Any]], sums: Any, arrays: Any, *, block: int) -> tuple[Any, Any]:
    """Adds up over blocks of rows, like `jax.lax.scan` over groups of `block` rows; each device goes through its own.

    Args:
        body: `(sums, rows) -> (sums, outs)`, which does nothing with `sums` but add to them; `rows` is `arrays` with at most
            `block` rows each, `outs` a pytree of arrays with as many rows, or None.
        sums: zeros, of the shapes and dtypes of the sums.
        arrays: a pytree of arrays that all have the same number of rows, the length of axis 0.
        block: rows in a block; the last one may have fewer, and all may where there are lanes.

    Returns:
        The sums over all rows, and `outs` of all rows together.
    """
    length = count_rows(arrays)

    def add_up(sums: Any, arrays: Any) -> tuple[Any, Any]:
        rows = count_rows(arrays)
        # in a lane, too, there are at least two blocks where there were some: what is recomputed needs the loop
        size = block if rows == length or block >= length else block_size(rows, min(block, max(rows // 2, 1)))
        return fold_blocks(body, sums, arrays, block=size)

    return by_device(add_up, sums, arrays)


def map_blocks(fn: Callable[..., Any], arrays: Any, *, block: int) -> Any:
    """`fn(rows)` for blocks of rows, together: `fn(arrays)` for an `fn` that treats each row for itself."""
    return scan_blocks(lambda _, rows: (None, fn(rows)), None, arrays, block=block)[1]


def fold_blocks(body: Callable[..., tuple[Any, Any]], carry: Any, arrays: Any, *, block: int) -> tuple[Any, Any]:
    """`scan_blocks` without lanes, for the rows of one device: `body` may do anything with `carry`, which starts anywhere."""
    length = count_rows(arrays)
    if is_symbolic_dim(length):
        return body(carry, arrays)
    full = length // block
    first = jax.tree.map(lambda x: x[: min(block, length)], arrays)
    carry = compat.vary_like(carry, lambda c: body(c, first)[0], first)
    outs = []
    if full == 1:
        carry, out = body(carry, jax.tree.map(lambda x: x[:block], arrays))
        outs.append(out)
    elif full > 1:
        grouped = jax.tree.map(lambda x: x[: full * block].reshape(full, block, *x.shape[1:]), arrays)
        carry, out = lax.scan(body, carry, grouped)
        outs.append(jax.tree.map(lambda y: y.reshape(full * block, *y.shape[2:]), out))
    if full * block < length or not full:
        carry, out = body(carry, jax.tree.map(lambda x: x[full * block :], arrays))
        outs.append(out)
    return carry, outs[0] if len(outs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def by_device(fn: Callable[..., tuple[Any, Any]], sums: Any, arrays: Any) -> tuple[Any, Any]:
    """`fn(sums, arrays) -> (sums, outs)` for the rows of each device by themselves, their sums added.

    Args:
        fn: adds to sums, and gives an out for each row.
        sums: zeros, of the shapes and dtypes of the sums.
        arrays: a pytree of arrays with as many rows each.
    """
    length, lanes = count_rows(arrays), count_lanes(arrays)
    if lanes == 1:
        return fn(sums, arrays)
    like = _placement(arrays)[1]
    with contextlib.nullcontext() if like is None else jax.sharding.use_abstract_mesh(like.mesh):
        starts = jax.tree.map(lambda s: _place(jnp.broadcast_to(s, (lanes, *s.shape)), like), sums)
        runs = jax.tree.map(lambda x: _place(x, like).reshape(lanes, length // lanes, *x.shape[1:]), arrays)
        sums, outs = jax.vmap(fn)(starts, runs)
        return jax.tree.map(lambda s: s.sum(0), sums), jax.tree.map(lambda y: y.reshape(length, *y.shape[2:]), outs)


def count_rows(arrays: Any) -> int:
    return jax.tree.leaves(arrays)[0].shape[0]


def count_lanes(arrays: Any) -> int:
    """How many runs of rows these arrays are split into, so that none lies on several devices."""
    length = count_rows(arrays)
    return 1 if is_symbolic_dim(length) or length == 0 else math.gcd(length, _placement(arrays)[0])


def _placement(arrays: Any) -> tuple[int, Any]:
    """How many devices the rows of these arrays may lie on; and the sharding of an array whose rows lie along explicit axes of a mesh, or None.

    Along automatic axes of its mesh an array may lie or not, it does not tell: all their devices count.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(arrays)]
    like = next((s for s in shardings if s.spec[0] is not None), None)
    mesh = next((s.mesh for s in shardings if not s.mesh.empty), jax.sharding.get_abstract_mesh())
    names = () if like is None else like.spec[0] if isinstance(like.spec[0], tuple) else (like.spec[0],)
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for name, size, kind in axes if kind == AxisType.Auto or name in names), like


def _place(x: jax.Array, like: Any) -> jax.Array:
    """`x` with its rows along the mesh axes of those of `like`."""
    return x if like is None else jax.sharding.reshard(x, NamedSharding(like.mesh, P(like.spec[0], *jax.typeof(x).sharding.spec[1:])))
