"""What vector quantisers share: the nearest code, the estimators of its gradient, sums for each code.

Padding    A row that is masked out has the index -1: that alone is kept of a mask.
Nearest    argmin_k |x - e_k|² = argmin_k |e_k|² - 2 x·e_k, for blocks of rows, so that the (rows, codes) matrix is never whole. Both are moved by
           the mean code first, so that codes that lie together far from the origin lose no digits; groups far from each other still do, in
           proportion to their distance. The mean is rounded to 8 bits: on a grid the differences stay exact, and so do ties. Codes so large or
           small that their squares overflow or underflow are scaled by a power of 2, and the rows with them.
Rotation   With x̂ = x / |x|, q̂ = q / |q| and r = (x̂ + q̂) / |x̂ + q̂|, the map R = I - 2 r rᵀ + 2 q̂ x̂ᵀ turns x̂ into q̂, and q = λ R x, λ = |q| / |x|.
           Its transpose, with λ and R held, is dx = λ (dy - 2 r (r·dy) + 2 x̂ (q̂·dy)). Where x is 0 there is no direction: dx = dy.

Reference: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", 2017; Fifty et al., "Restructuring Vector
Quantization with the Rotation Trick", 2024 (arXiv 2410.06424).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from layers.core import checks
from layers.core.blocks import block_size, by_device, map_blocks
from layers.core.lengths import row_lengths
from layers.core.machine import choose
from layers.core.numerics import safe_reciprocal, wide
from layers.core.products import einsum
from layers.core.rows import as_rows
from layers.core.sharding import explicit_sharding

GRADIENTS = ("straight_through", "rotation")

BLOCK_BYTES, FAR_BLOCK_BYTES = 1 << 21, 1 << 27
"""Of the distances of a block of rows, on a CPU, where they stay in a core's cache, and on an accelerator."""

LEAST_ROWS = 64
"""A block has as many, however large the codebook: a matrix product of fewer rows is slow."""


def nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the nearest code for each row, the first of several.

    Where no distance is a number, the first code that is not finite, so that it shows, or else 0.

    Args:
        x: (rows, features).
        codebook: (codes, features).

    Returns:
        (rows,), int32.
    """
    dtype = wide(jnp.promote_types(x.dtype, codebook.dtype))
    codes = codebook.astype(dtype)
    centre = lax.reduce_precision(codes.mean(0), exponent_bits=jnp.finfo(dtype).nexp, mantissa_bits=7)
    codes = codes - centre
    unit = _unit(jnp.abs(codes).max())
    codes = codes * unit
    squares = jnp.square(codes).sum(-1)
    count = len(codes)
    broken = jnp.argmax(~jnp.isfinite(codebook).all(-1)).astype(jnp.int32)

    def index(rows: jax.Array) -> jax.Array:
        scores = squares - 2 * einsum("rf,cf->rc", (rows.astype(dtype) - centre) * unit, codes, precision=lax.Precision.HIGHEST)
        least = scores.min(-1, keepdims=True)
        first = jnp.where(scores == least, jnp.arange(count, dtype=jnp.int32), count).min(-1)
        return jnp.where(first == count, broken, first)

    block = block_size(x.shape[0], max(LEAST_ROWS, choose(BLOCK_BYTES, FAR_BLOCK_BYTES) // (dtype.itemsize * count)))
    return map_blocks(index, x, block=block)


def _unit(largest: jax.Array) -> jax.Array:
    """A power of 2 that makes the largest entry about 1, where its square or those of much smaller ones are not normal numbers; else 1."""
    info = jnp.finfo(largest.dtype)
    safe = jnp.clip(largest, 2.0 ** (info.minexp + 2), 2.0 ** (info.maxexp - 4))
    power = lax.reduce_precision(1 / safe, exponent_bits=info.nexp, mantissa_bits=0)
    far = (largest > 2.0 ** (info.maxexp // 4)) | ((largest < 2.0 ** (info.minexp // 4)) & (largest > 0))
    return jnp.where(far, power, jnp.ones((), largest.dtype))


def shows_nan(x: jax.Array, q: jax.Array) -> jax.Array:
    """The codes `q` of the vectors `x`, NaN where these are: an index has no way to say so."""
    return jnp.where(jnp.isnan(x), x, q.astype(x.dtype))


def codes_at(codebook: jax.Array, indices: jax.Array) -> jax.Array:
    """`codebook[indices]`, which lies along explicit axes of a mesh as the indices do."""
    like = explicit_sharding(indices)
    return codebook.at[indices].get(out_sharding=None if like is None else NamedSharding(like.mesh, P(*like.spec, None)))


def pull_back(gradient: str, x: jax.Array, q: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of `x` from that of `q`, its quantised vectors, by the estimator named `gradient`; all (rows, features)."""
    if gradient == "straight_through":
        return dy
    dtype = wide(x.dtype)
    x, q, dy = (v.astype(dtype) for v in (x, q, dy))
    x, q = lax.stop_gradient((x, q))
    length, size = row_lengths(x), row_lengths(q)
    xhat, qhat = x * safe_reciprocal(length), q * safe_reciprocal(size)
    r = xhat + qhat
    r = r * safe_reciprocal(row_lengths(r))
    turned = dy - 2 * r * (r * dy).sum(-1, keepdims=True) + 2 * xhat * (qhat * dy).sum(-1, keepdims=True)
    return jnp.where(length == 0, dy, size * safe_reciprocal(length) * turned)


def code_sums(rows: jax.Array, indices: jax.Array, count: int) -> jax.Array:
    """The sum of the rows of each index, (count, *features), in float32 or wider."""

    def add(sums: jax.Array, arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, indices = arrays
        return sums + jax.ops.segment_sum(rows.astype(sums.dtype), indices, count), None

    return by_device(add, jnp.zeros((count, *rows.shape[1:]), wide(rows.dtype)), (rows, indices))[0]


def mean_square(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The mean of the squares of the rows of `x` that have an index, 0 where there are none; the other rows are 0."""
    return jnp.square(x).sum() / entries(x, indices)


def entries(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The number of entries of `x` in rows that have an index, at least 1, in float32 or wider; it may be symbolic (`jax.export`)."""
    rows = (indices >= 0).sum(dtype=wide(x.dtype))
    return jnp.maximum(rows * x.shape[-1], 1)


def without_padding(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The rows of `x`, (rows, features), that have an index, and 0 for the others, whatever they hold."""
    return jnp.where(indices[:, None] >= 0, x, 0)


def nearest_but_padding(x: jax.Array, codebook: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`nearest`, and -1 for the rows that the mask, (rows,), leaves out."""
    if mask is None:
        return nearest(x, codebook)
    return jnp.where(mask, nearest(jnp.where(mask[:, None], x, 0), codebook), -1)


def mask_rows(name: str, mask: Any, x: jax.Array) -> jax.Array | None:
    """The mask of the vectors of `x` as one axis of bool; None stays None."""
    mask = checks.array(name, "mask", mask, "mask", optional=True)
    checks.shape(name, "mask", mask, x.shape[:-1], "(*batch,)", x=x)
    return None if mask is None else as_rows(mask[..., None] != 0)[:, 0]


def check_codebook(name: str, codebook: Any, x: jax.Array) -> jax.Array:
    """The codebook as an array (codes, features) whose features are those of `x`."""
    codebook = checks.array(name, "codebook", codebook)
    if codebook.ndim != 2 or codebook.shape[0] == 0:
        raise ValueError(f"{name}: codebook has shape {codebook.shape}, but must be (codes, features) with at least one code")
    if x.ndim < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{name}: codebook has shape {codebook.shape}, but its last axis must be that of x (x: {x.shape}); "
            "move the features of x to the end, jnp.moveaxis(x, axis, -1)"
        )
    return codebook
