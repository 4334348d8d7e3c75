"""Each row times the kernel of its group.

    rows lie group by group: the first group_sizes[0] of them belong to group 0, and so on; g(i) is the group of row i
Forward   y_i = x_i W_g(i)
Backward  dx_i = dy_i W_g(i)ᵀ,   dW_g = Σ_{g(i) = g} x_iᵀ dy_i

Rows after the last group have y = 0 and dx = 0, whatever they hold. Both products of the backward are grouped ones again, so derivatives of any order
are; tangents are y' = x' W + x W'.

The rows of a group go through its kernel in blocks, as many as it needs: the work is that of the rows there are (`group_loops.py`).
Saved     x, the kernels and the sizes, which are alive anyway.

Reference: `jax.lax.ragged_dot`; Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2023.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.experts.group_loops import map_groups, sum_groups
from layers.function.function import Function

LEAST_BLOCK, MOST_BLOCK = 8, 512


class GroupedMatmulFunction(Function):
    """x_i W_g(i), or with `transposed` x_i W_g(i)ᵀ."""

    @staticmethod
    def forward(ctx, x, kernels, group_sizes, block, transposed):
        ctx.save_for_backward(x, kernels, group_sizes)
        ctx.block, ctx.transposed = block, transposed
        if ctx.requires_grad:  # what is differentiated again is this rule, not its loops
            return GroupedMatmulFunction.apply(x, kernels, group_sizes, block, transposed)
        return map_groups(x, kernels, group_sizes, block, transposed=transposed, dtype=jnp.promote_types(x.dtype, kernels.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, kernels, sizes = ctx.saved_tensors
        dx = dkernels = None
        if ctx.needs_input_grad[0]:
            dx = GroupedMatmulFunction.apply(dy, kernels, sizes, ctx.block, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            first, second = (dy, x) if ctx.transposed else (x, dy)
            dkernels = GroupedOuterFunction.apply(first, second, sizes, ctx.block)
        return dx, dkernels, None, None, None

    @staticmethod
    def jvp(ctx, x_dot, kernels_dot, *_):
        x, kernels, sizes = ctx.saved_tensors
        product = lambda a, b: GroupedMatmulFunction.apply(a, b, sizes, ctx.block, ctx.transposed)
        return product(x_dot, kernels) + product(x, kernels_dot)

    @staticmethod
    def surrogate(x, kernels, group_sizes, block, transposed):
        ends = jnp.cumsum(group_sizes)
        group = jnp.searchsorted(ends, jnp.arange(len(x)), side="right")
        chosen = jnp.take(kernels, jnp.minimum(group, len(kernels) - 1), axis=0)
        y = jnp.einsum("ik,ink->in" if transposed else "ik,ikn->in", x, chosen)
        return jnp.where((group < len(kernels))[:, None], y, 0)

    @staticmethod
    def example(key, dtype):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (9, 3), dtype), jax.random.normal(second, (4, 3, 2), dtype), jnp.array([3, 0, 4, 1]), 2, False

    @staticmethod
    def examples(key, dtype):
        x, kernels, sizes, block, _ = GroupedMatmulFunction.example(key, dtype)
        return {
            "transposed": (x, kernels.swapaxes(1, 2), sizes, block, True),
            "far out": (1e4 * x, kernels, sizes, block, False),
            "rows of no group": (x, kernels, 0 * sizes, block, False),
        }


class GroupedOuterFunction(Function):
    """Σ x_iᵀ y_i over the rows of each group."""

    @staticmethod
    def forward(ctx, x, y, group_sizes, block):
        ctx.save_for_backward(x, y, group_sizes)
        ctx.block = block
        if ctx.requires_grad:
            return GroupedOuterFunction.apply(x, y, group_sizes, block)
        return sum_groups(x, y, group_sizes, block, jnp.promote_types(x.dtype, y.dtype))

    @staticmethod
    def backward(ctx, dsums):
        x, y, sizes = ctx.saved_tensors
        dx = GroupedMatmulFunction.apply(y, dsums, sizes, ctx.block, True) if ctx.needs_input_grad[0] else None
        return dx, GroupedMatmulFunction.apply(x, dsums, sizes, ctx.block, False) if ctx.needs_input_grad[1] else None, None, None

    @staticmethod
    def jvp(ctx, x_dot, y_dot, *_):
        x, y, sizes = ctx.saved_tensors
        outer = lambda a, b: GroupedOuterFunction.apply(a, b, sizes, ctx.block)
        return outer(x_dot, y) + outer(x, y_dot)

    @staticmethod
    def example(key, dtype):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (9, 3), dtype), jax.random.normal(second, (9, 2), dtype), jnp.array([3, 0, 4, 1]), 2

    @staticmethod
    def examples(key, dtype):
        x, y, sizes, block = GroupedOuterFunction.example(key, dtype)
        return {"far out": (1e4 * x, y, sizes, block), "rows of no group": (x, y, 0 * sizes, block)}


def grouped_matmul(
    x: Float[Array, "rows in_features"],
    kernels: Float[Array, "groups in_features out_features"],
    group_sizes: Int[Array, " groups"],
    *,
    block_size: int | None = None,
) -> Float[Array, "rows out_features"]:
    """Multiplies each row by the kernel of its group, with as many operations as there are rows, whatever the groups' sizes.

    Args:
        x: rows, group by group.
        kernels: one for each group.
        group_sizes: the rows of each group. Rows after the last group give 0, and what exceeds the rows is left out.
        block_size: rows multiplied at once; None chooses by the mean size of a group.

    Returns:
        `(rows, out_features)`, of the common dtype of `x` and `kernels`.

    Raises:
        ValueError: where the shapes do not fit. TypeError: where `x` or `kernels` is not of a floating-point dtype, or the sizes not integers.

    Reference: `jax.lax.ragged_dot`, whose arguments these are.
    """
    who = "grouped_matmul"
    x = checks.array(who, "x", x, "inexact", ndim=2)
    kernels = checks.array(who, "kernels", kernels, "inexact", ndim=3)
    group_sizes = checks.array(who, "group_sizes", group_sizes, "integer", ndim=1)
    if kernels.shape[1] != x.shape[1]:
        raise ValueError(f"{who}: kernels has shape {kernels.shape}, but must be (groups, in_features, out_features) with those of x (x: {x.shape})")
    checks.shape(who, "group_sizes", group_sizes, kernels.shape[:1], "(groups,)", kernels=kernels)
    block_size = checks.integer(who, "block_size", block_size, "[1, 2147483647]", optional=True)
    if not x.shape[0] or not kernels.shape[0]:
        return jnp.zeros((x.shape[0], kernels.shape[2]), jnp.promote_types(x.dtype, kernels.dtype))
    if jnp.iscomplexobj(x) != jnp.iscomplexobj(kernels):  # what is cast here gets the real part of its gradient
        x, kernels = (a.astype(jnp.promote_types(x.dtype, kernels.dtype)) for a in (x, kernels))
    block = min(block_size, x.shape[0]) if block_size else block_for(x.shape[0], kernels.shape[0])
    return GroupedMatmulFunction.apply(x, kernels, group_sizes.astype(jnp.int32), block, False)


def block_for(rows: int, groups: int) -> int:
    """The power of two near half of the mean size: the last block of a group is half empty, so this costs a quarter more than is needed."""
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half.bit_length() - 1), LEAST_BLOCK), MOST_BLOCK, rows)
