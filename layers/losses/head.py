"""The linear map from features to a vocabulary, in blocks of rows: its logits, and the gradients that those of the logits give.

    a = x kernel + bias,   dx = da kernelᵀ,   dkernel = Σ xᵀ da,   dbias = Σ da

A block of logits is all that is ever there. dkernel adds up in float32 or wider over the blocks, in slices of the vocabulary, so that each is
added where it stands and only one product of a slice's size is beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from layers.core.blocks import block_size, fold_blocks, scan_blocks
from layers.core.machine import UNLIMITED, choose, on_accelerator
from layers.core.numerics import dot, hidden_dot, wide

LOGITS_BYTES, SLICE_BYTES = 1 << 25, 1 << 22
"""On a CPU, of a float32 block of logits, and of a float32 slice of dkernel or of the gradients of a block of logits."""
FAR_LOGITS_BYTES, FAR_BLOCKS = 1 << 29, 4
"""On an accelerator, which waits for each step of a loop: of a block of logits, and how many there are at least. Blocks are not divided further."""
FAST_ROWS = 512
"""In a block, where twice those bytes are enough: with fewer, products of matrices wait for the kernel to be read."""
GROUP_BYTES = 1 << 20
"""Of a float32 group of rows in which a block of logits is gone through."""
LEAST_ROWS, MOST_ROWS = 32, 1024
"""In a block: with few rows dkernel is read and written too often, with many the logits leave the caches."""


class Head(NamedTuple):
    """kernel (features, vocab), bias (vocab,) or None."""

    kernel: jax.Array
    bias: jax.Array | None

    @property
    def vocab(self) -> int:
        return self.kernel.shape[1]

    def logits(self, x: jax.Array) -> jax.Array:
        """Those of a block of rows, in float32 or wider."""
        a = hidden_dot("rf,fv->rv", x, self.kernel)
        return a if self.bias is None else a + self.bias.astype(a.dtype)


def rows_in_block(rows: int, vocab: int, asked: int | None) -> int:
    """How many of `rows` are in a block; `vocab` counts the logits of a row that are there at once."""
    fit = choose(LOGITS_BYTES, FAR_LOGITS_BYTES) // (4 * max(vocab, 1))
    if on_accelerator():
        return block_size(rows, _far_target(rows, fit), asked)
    target = FAST_ROWS if FAST_ROWS // 2 <= fit <= FAST_ROWS else max(LEAST_ROWS, min(MOST_ROWS, fit))
    return block_size(rows, target, asked)


def _far_target(rows: Any, fit: int) -> int:
    return fit if is_symbolic_dim(rows) else max(MOST_ROWS, min(fit, rows // FAR_BLOCKS))


@dataclass(frozen=True)
class Gradients:
    """Which gradients of a head are wanted, and how they come from those of its logits."""

    x: bool
    kernel: bool
    bias: bool

    def start(self, head: Head, dtype: Any) -> Any:
        """The sums over no rows."""
        kernel = jnp.zeros(head.kernel.shape, dtype) if self.kernel else None
        return kernel, jnp.zeros((head.vocab,), dtype) if self.bias else None

    def add(self, sums: Any, da: jax.Array, x: jax.Array, head: Head, touched: jax.Array) -> tuple[Any, jax.Array | None]:
        """The sums with a block of rows more, and dx of these rows; where a row is not touched, da is 0 and x may be anything."""
        dkernel, dbias = sums
        dbias = dbias + da.sum(0) if self.bias else None
        da = da.astype(jnp.promote_types(x.dtype, head.kernel.dtype))
        dx = dot("rv,fv->rf", da, head.kernel) if self.x else None
        if self.kernel:
            dkernel = _add_product(dkernel, jnp.where(touched[:, None] | jnp.isfinite(x), x, 0), da)
        return (dkernel, dbias), dx

    def tangent(self, x: jax.Array, dx: jax.Array, head: Head, dhead: Head) -> jax.Array:
        """That of a block of logits, from those of x and the head."""
        da = jnp.zeros((x.shape[0], head.vocab), wide(x.dtype))
        da = da + dot("rf,fv->rv", dx, head.kernel) if self.x else da
        da = da + dot("rf,fv->rv", x, dhead.kernel) if self.kernel else da
        return da + dhead.bias.astype(da.dtype) if self.bias and dhead.bias is not None else da


def fold(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, *, block: int) -> tuple[Any, Any]:
    """`scan_blocks`; differentiated once more, it computes each block again."""
    return scan_blocks(jax.checkpoint(body, prevent_cse=False), carry, arrays, block=block)


def by_groups(fn: Callable[[Any], Any], arrays: Any) -> Any:
    """`fn(rows of arrays)` over groups of rows that stay in a core's cache; the first array is a block of logits."""
    return fold_blocks(lambda _, rows: (None, fn(rows)), None, arrays, block=_rows_in_group(jax.tree.leaves(arrays)[0]))[1]


def replace_by_groups(fn: Callable[[jax.Array, Any], jax.Array], a: jax.Array, arrays: Any) -> jax.Array:
    """`fn(rows of a, rows of arrays)` over such groups, in place of `a`.

    `fn` has to be elementwise but for what it is given for each row: XLA copies all of `a` for each group that is read again after it is written.
    """

    if is_symbolic_dim(a.shape[0]):
        return fn(a, arrays)

    def body(a: jax.Array, block: Any) -> tuple[jax.Array, None]:
        places, arrays = block
        new = fn(lax.dynamic_slice_in_dim(a, places[0], places.shape[0]), arrays)
        return lax.dynamic_update_slice_in_dim(a, new, places[0], 0), None

    return fold_blocks(body, a, (jnp.arange(a.shape[0]), arrays), block=_rows_in_group(a))[0] if a.shape[0] else a


def _rows_in_group(a: jax.Array) -> int:
    return block_size(a.shape[0], max(1, choose(GROUP_BYTES, UNLIMITED) // (4 * a.shape[1])))


def _add_product(dkernel: jax.Array, x: jax.Array, da: jax.Array) -> jax.Array:
    """dkernel + xᵀ da."""
    features, vocab = dkernel.shape
    rows = 1 if is_symbolic_dim(x.shape[0]) else x.shape[0]
    width = block_size(vocab, max(1, choose(SLICE_BYTES, UNLIMITED) // (4 * max(features, rows, 1))))

    def add(dkernel: jax.Array, start: Any, width: int) -> jax.Array:
        part = dot("rf,rv->fv", x, lax.dynamic_slice_in_dim(da, start, width, 1))
        return lax.dynamic_update_slice_in_dim(dkernel, lax.dynamic_slice_in_dim(dkernel, start, width, 1) + part, start, 1)

    whole = vocab // width
    if whole > 1:
        dkernel, _ = lax.scan(lambda d, i: (add(d, i * width, width), None), dkernel, jnp.arange(whole))
    elif whole:
        dkernel = add(dkernel, 0, width)
    return add(dkernel, whole * width, vocab - whole * width) if vocab % width else dkernel
