"""Rows of a table, by index.

    y[i] = embedding[indices[i]]
    dembedding[v] = Σ dy[i] over all i with indices[i] = v

The sum is taken in float32 or wider, whatever the dtype of the table: a frequent index adds many small numbers.

Saved: the indices. Of the table backward needs the shape only.

Reference: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2016, for `Embed.attend`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.numerics import wide
from layers.function.function import Function


class EmbedFunction(Function):
    @staticmethod
    def forward(ctx, indices, embedding, dtype=None):
        if indices.dtype.itemsize < 4:  # the size of the table may not fit the dtype, and negative indices have it added
            indices = indices.astype(jnp.int32)
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dtype = embedding.shape, wide(embedding.dtype)
        return jnp.take(embedding, indices, axis=0).astype(dtype or embedding.dtype)

    @staticmethod
    def backward(ctx, dy):
        (indices,) = ctx.saved_tensors
        return None, jnp.zeros(ctx.shape, ctx.dtype).at[indices].add(dy.astype(ctx.dtype), mode="drop"), None

    @staticmethod
    def example(key, dtype):
        return jnp.array([[0, 3, 3], [6, 0, -1]]), jax.random.normal(key, (7, 5), dtype)

    @staticmethod
    def examples(key, dtype):
        indices, embedding = EmbedFunction.example(key, dtype)
        return {
            "rows in another dtype": (indices, embedding, jnp.float64),
            "outside of the table": (indices - 5, embedding),
            "8-bit indices": (indices.astype(jnp.int8), embedding),
            "far out": (indices, 1e4 * embedding),
            "no rows": (indices[:0], embedding),
        }


def embed(indices: Int[Array, "*batch"], embedding: Float[Array, "vocab features"]) -> Float[Array, "*batch features"]:
    """Looks up rows of a table by their index, as `flax.nnx.Embed`.

    An index from -vocab to -1 counts from the end; any other outside of the table gives a row of NaN and no gradient, as with `jax.numpy.take`.

    Args:
        indices: integers of any shape.
        embedding: the table.

    Returns:
        The rows, of the dtype of the table.

    Raises:
        TypeError: where `indices` are not integers or the table is not of a floating-point dtype.
        ValueError: where the table has not two axes.
    """
    indices = checks.array("embed", "indices", indices, "integer")
    embedding = checks.array("embed", "embedding", embedding, "inexact", ndim=2)
    if indices.size and not len(embedding):
        raise ValueError(f"embed: embedding has shape {embedding.shape}, but must have a row to take (indices: {indices.shape})")
    return EmbedFunction.apply(indices, embedding)


class Embed(nnx.Embed):
    """`flax.nnx.Embed`: the same arguments, parameters and values, with `attend`; backward keeps the indices only."""

    @functools.wraps(nnx.Embed.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        given = checks.arguments("Embed", super().__init__, args, kwargs)
        for what in ("num_embeddings", "features"):
            given[what] = checks.integer("Embed", what, given[what], "[1, 2147483647]")
        checks.dtype("Embed", "dtype", given["dtype"], "inexact")
        checks.dtype("Embed", "param_dtype", given["param_dtype"], "inexact", optional=False)
        super().__init__(**given)

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        if out_sharding is not None:
            return super().__call__(inputs, out_sharding)
        inputs = checks.array("Embed", "inputs", inputs, "integer")
        table, dtype = self.embedding[...], self.dtype
        if self.promote_dtype is not dtypes.promote_dtype:
            (table,) = self.promote_dtype((table,), dtype=dtype, inexact=False)
            dtype = table.dtype
        indices = jnp.zeros_like(inputs) if self.num_embeddings == 1 else inputs
        return EmbedFunction.apply(indices, table, dtype=dtype)
