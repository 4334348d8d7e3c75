"""Loops over blocks of rows, with a ragged last block: the only form in which XLA really frees what a block needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat


def block_size(length: int, target: int) -> int:
    """The size of the blocks for `length` rows: the largest divisor of `length` in (target / 2, target], else `target`."""
    if length <= target:
        return max(length, 1)
    divisors = (b for b in range(target, target // 2, -1) if length % b == 0)
    return next(divisors, target)


def scan_blocks(body: Callable[..., tuple[Any, Any]], carry: Any, arrays: Any, *, block: int) -> tuple[Any, Any]:
    """Folds `body` over blocks of rows, like `jax.lax.scan` over groups of `block` rows.

    Args:
        body: `(carry, rows) -> (carry, outs)`; `rows` is `arrays` with at most `block` rows each,
            `outs` a pytree of arrays with as many rows, or None.
        carry: where it starts.
        arrays: a pytree of arrays that all have the same number of rows, the length of axis 0.
        block: rows in a block; the last one may have fewer.

    Returns:
        The last carry, and `outs` of all rows together.
    """
    length = jax.tree.leaves(arrays)[0].shape[0]
    full = length // block
    carry = _like_result(body, carry, jax.tree.map(lambda x: x[: min(block, length)], arrays))
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


def map_blocks(fn: Callable[..., Any], arrays: Any, *, block: int) -> Any:
    """`fn(rows)` for blocks of rows, together: `fn(arrays)` for an `fn` that treats each row for itself."""
    return scan_blocks(lambda _, rows: (None, fn(rows)), None, arrays, block=block)[1]


def _like_result(body: Callable[..., tuple[Any, Any]], carry: Any, rows: Any) -> Any:
    """The carry marked as varying over the mesh axes that the loop will make it vary over (`shard_map`)."""
    if not any(compat.varying_axes(jax.typeof(x)) for x in jax.tree.leaves((carry, rows))):
        return carry
    return compat.vary_like(carry, lambda c: body(c, rows)[0])
