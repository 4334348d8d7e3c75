"""The two halves of a multilayer perceptron, forward and back, in blocks of rows.

    a_i = x kernel_i + bias_i,   h = hidden(a_1, ...),   y = h down_kernel + down_bias

A block of h, and of the a that are not saved, is all that is ever there. Going back, with dy given,

    dh = dy down_kernelᵀ,   ddown_kernel = Σ hᵀ dy,   ddown_bias = Σ dy
    da_i = dh ∂hidden/∂a_i,   dkernel_i = Σ xᵀ da_i,   dbias_i = Σ da_i,   dx = Σ_i da_i kernel_iᵀ

where x may be the norm of rows (`prenorm.py`), which is not kept either, and the sums of all blocks add up in float32 or wider. The loop is
what makes the saving real: of recomputed products that stand free, XLA finds that forward has them already, and keeps those.

Where h goes through dropout on its way, with a mask m, m h / (1 - rate) stands for h in both, and da_i is multiplied in the same way. The mask is
drawn for the rows of a block, from a hash of the words of a key and the place in all of h: whatever the blocks, it is that of `layers.dropout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.blocks import block_size, map_blocks
from layers.core.deferred import scan_blocks_deferred
from layers.core.hashing import hash_bits, masked, spared
from layers.core.machine import choose
from layers.core.numerics import dot, hidden_dot, wide
from layers.core.recompute import barrier
from layers.perceptrons import prenorm

HIDDEN_BYTES, FAR_HIDDEN_BYTES = 1 << 22, 1 << 28
"""Of a float32 block of the hidden layer on a CPU, and of a block on an accelerator."""
LEAST_ROWS, FAR_LEAST_ROWS = 128, 2048
"""In a block: with fewer the kernels and the sums of their gradients are read too often."""


class Affine(NamedTuple):
    """kernel (inputs, outputs), bias (outputs,) or None; or what is to be known of each, gradients or flags."""

    kernel: Any
    bias: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """In float32 or wider."""
        a = hidden_dot("ri,io->ro", x, self.kernel)
        return a if self.bias is None else a + self.bias.astype(a.dtype)

    def add(self, x: Any, dy: jax.Array) -> Affine:
        """These sums of gradients, those that are not None, with those of a block of rows added: input x, gradient dy of the output."""
        kernel = None if self.kernel is None else self.kernel + dot("ri,ro->io", x, dy.astype(x.dtype)).astype(self.kernel.dtype)
        return Affine(kernel, None if self.bias is None else self.bias + dy.astype(self.bias.dtype).sum(0))


class Hidden(Protocol):
    """What stands between the products: h of one array a, or of several, and `(dh, *a)` to the gradient of each a."""

    @property
    def value(self) -> Callable[..., jax.Array]: ...

    @property
    def pull(self) -> Callable[..., tuple[jax.Array, ...]]: ...


class Plan(NamedTuple):
    """How it is computed.

    Attributes:
        hidden: what stands between the products.
        keep: whether the a are kept for backward.
        block: rows in a block; None to choose.
        dtype: of the operands of the products and of the output; None for the common one of the arrays.
        epsilon: of the norm, where there is one.
        scale_offset: is added to the scale of the norm.
        rate: the probability with which elements of h are dropped, where there are words.
        words: of the key; None to drop nothing.
    """

    hidden: Hidden
    keep: bool
    block: int | None = None
    dtype: Any = None
    epsilon: Any = 0.0
    scale_offset: float = 0.0
    rate: Any = 0.0
    words: Any = None

    def dropping(self, places: Any, rows: int, hidden_features: int) -> Callable[[jax.Array], jax.Array]:
        """Dropout of arrays that lie as the hidden layer at these of its `rows`."""
        if self.words is None:
            return lambda h: h
        kept = spared(hash_bits(self.words, (rows, hidden_features), places), self.rate)
        return lambda h: masked(h, kept, self.rate)

    def places(self, rows: int) -> Any:
        """Those of the rows, if they are to be known."""
        return None if self.words is None else lax.broadcasted_iota(jnp.uint32, (rows,), 0)

    def factor(self, scale: jax.Array) -> jax.Array:
        """What the norm of x is multiplied by."""
        return scale.astype(wide(scale.dtype)) + self.scale_offset if self.scale_offset else scale

    def rows_in_block(self, rows: int, hidden_features: int, dtype: Any) -> int:
        """Of a hidden layer of a dtype."""
        least, size, width = choose((LEAST_ROWS, HIDDEN_BYTES, 4), (FAR_LEAST_ROWS, FAR_HIDDEN_BYTES, jnp.dtype(dtype).itemsize))
        return block_size(rows, max(least, size // (width * max(hidden_features, 1))), self.block)


def run(x: jax.Array, scale: Any, ups: Sequence[Affine], down: Affine, plan: Plan) -> tuple[jax.Array, Any]:
    """y, and the a if they are to be kept; of the norm of x where there is a scale."""
    dtype = plan.dtype or jnp.result_type(x, *jax.tree.leaves((ups, down)))
    ups, down = _cast((ups, down), dtype)

    rows, hidden_features = x.shape[0], down.kernel.shape[0]

    def block(given: Any) -> tuple[jax.Array, Any]:
        x, places = given
        n = x if scale is None else prenorm.normalize(x, plan.epsilon)[0] * plan.factor(scale)
        a = [up(n.astype(dtype)) for up in ups]
        y = down(plan.dropping(places, rows, hidden_features)(plan.hidden.value(*a).astype(dtype)))
        return y.astype(dtype), [a.astype(dtype) for a in a] if plan.keep else None

    return map_blocks(block, (x, plan.places(rows)), block=plan.rows_in_block(rows, hidden_features, dtype))


class Needs(NamedTuple):
    """What is to be computed, or has been: flags or gradients."""

    x: Any
    scale: Any
    ups: Sequence[Affine]
    down: Affine


def run_back(dy: jax.Array, x: jax.Array, scale: Any, kept: Any, ups: Sequence[Affine], down: Affine, plan: Plan, needs: Needs) -> Needs:
    """The gradients that `needs` asks for, None for the others."""
    dtype, rows, hidden_features = dy.dtype, dy.shape[0], down.kernel.shape[0]
    size = plan.rows_in_block(rows, hidden_features, dtype)
    if size >= rows:  # there is no loop to protect what is recomputed
        (x, scale, kept, ups, down), dy = barrier((x, scale, kept, ups, down), dy)
    dscale = _zeros(Affine(None, scale), Affine(False, needs.scale)).bias
    start = dscale, [_zeros(up, n) for up, n in zip(ups, needs.ups, strict=True)], _zeros(down, needs.down)
    (ups, down), needs_up, needs_n = _cast((ups, down), dtype), any(any(n) for n in needs.ups), needs.x or needs.scale

    def block(sums: Any, given: Any) -> tuple[Any, Any]:
        dy, x, a, places = given
        dscale, dups, ddown = sums
        drop = plan.dropping(places, rows, hidden_features)
        xhat, root = (x, None) if scale is None else prenorm.normalize(x, plan.epsilon)
        n = (xhat if scale is None else xhat * plan.factor(scale)).astype(dtype)
        a = [up(n) for up in ups] if a is None else [a.astype(wide(dtype)) for a in a]
        if needs.down.kernel:
            ddown = ddown.add(drop(plan.hidden.value(*a).astype(dtype)), dy)
        elif needs.down.bias:
            ddown = ddown.add(None, dy)
        if not needs_n and not needs_up:
            return (dscale, dups, ddown), None
        da = [drop(d) for d in plan.hidden.pull(hidden_dot("ro,io->ri", dy, down.kernel), *a)]  # what is dropped may be NaN
        dups = [dup.add(n, d) for dup, d in zip(dups, da, strict=True)]
        if not needs_n:
            return (dscale, dups, ddown), None
        dx = jnp.asarray(sum(dot("ro,io->ri", d.astype(dtype), up.kernel) for d, up in zip(da, ups, strict=True)))
        if scale is not None and root is not None:
            dx, more = prenorm.pull(dx, xhat, root, plan.factor(scale))
            dscale = dscale + more.astype(dscale.dtype) if needs.scale else None
        return (dscale, dups, ddown), dx.astype(x.dtype) if needs.x else None

    (dscale, dups, ddown), dx = scan_blocks_deferred(block, start, (dy, x, kept, plan.places(rows)), block=size)
    return Needs(dx, dscale, dups, ddown)


def _cast(parameters: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(dtype), parameters)


def _zeros(like: Affine, needs: Affine) -> Affine:
    return Affine(*(jnp.zeros(p.shape, wide(p.dtype)) if p is not None and n else None for p, n in zip(like, needs, strict=True)))
