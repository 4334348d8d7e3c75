"""Vectors for the solvers: lists of arrays, so that each keeps its shape and its sharding.

Inner products are real, also of complex arrays: the space is real, and a map that is linear over the reals only is linear in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from layers.core import compat
from layers.core.lengths import scaled_squares
from layers.core.sharding import explicit_sharding, sharded_as

Vector = list[jax.Array]
Map = Callable[[Vector], Vector]


def dot(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    """The real inner product."""
    return sum((jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in zip(a, b, strict=True)), jnp.zeros((), real_dtype(a)))


def rms(a: Sequence[Any]) -> jax.Array:
    """The root mean square of all entries, finite wherever they are."""
    scale, squares = scaled_squares(a)
    return scale * jnp.sqrt(squares / size(a))


def size(a: Sequence[Any]) -> int:
    """The number of entries, at least 1."""
    return max(sum(math.prod(x.shape) for x in a), 1)


def real_dtype(a: Sequence[Any]) -> Any:
    """The dtype of inner products."""
    return jnp.finfo(jnp.result_type(*a)).dtype if a else jnp.dtype(jnp.float32)


def plus(a: Vector, b: Vector, factor: Any = 1) -> Vector:
    """a + factor b."""
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def times(factor: Any, a: Vector) -> Vector:
    return [factor * x for x in a]


def choose(condition: Any, a: Vector, b: Vector) -> Vector:
    return [jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)]


def stack_of_zeros(count: int, a: Vector) -> Vector:
    """Room for `count` vectors."""
    return [jnp.broadcast_to(sharded_as(jnp.zeros_like(x), x), (count, *x.shape)) for x in a]


def put(stack: Vector, i: Any, a: Vector) -> Vector:
    return [lax.dynamic_update_index_in_dim(s, x, i, 0) for s, x in zip(stack, a, strict=True)]


def take(stack: Vector, i: Any) -> Vector:
    return [s[i] for s in stack]


def dots(stack: Vector, a: Vector) -> jax.Array:
    """The inner product of each vector of a stack with `a`."""

    def product(s: jax.Array, x: jax.Array) -> jax.Array:
        like = explicit_sharding(x)
        over = (list(range(1, s.ndim)), list(range(x.ndim)))
        everywhere = None if like is None else NamedSharding(like.mesh, P(None))
        return jnp.real(lax.dot_general(jnp.conj(s), x, (over, ([], [])), precision=lax.Precision.HIGHEST, out_sharding=everywhere))

    return sum((product(s, x) for s, x in zip(stack, a, strict=True)), jnp.zeros((), real_dtype(a)))


def combine(weights: jax.Array, stack: Vector) -> Vector:
    """The sum of the vectors of a stack, weighted."""
    return [lax.dot_general(weights.astype(s.dtype), s, (([0], [0]), ([], [])), precision=lax.Precision.HIGHEST) for s in stack]


def while_loop(go_on: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop`, whose carry starts out varying over the mesh axes that the body makes it vary over (`shard_map`)."""
    return lax.while_loop(go_on, body, compat.vary_like(carry, body))
