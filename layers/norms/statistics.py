"""What every normalisation shares: weighted sums over axes and devices, the gradient they give the input, loops over rows.

With x̂ = (x - mean) / root, w the weight of an element in its mean (1 / n, and 0 where masked) and g the cotangent of x̂,

    mean = Σ w x,  var = Σ w (x - mean)²,  root = (var + epsilon)^1/2
    dvar = -½ Σ g x̂ / root²,   dmean = -Σ g / root                 (Σ w (x - mean) = 0, so mean does not act through var)
    dx   = (g - w (Σ g + x̂ Σ g x̂)) / root

and without the term Σ g where the mean is not subtracted. Sums go over the axes, and over the devices of a named axis. Neither the squares nor
1 / root overflow or underflow where x̂ does not (`core/roots.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from layers.core.blocks import block_size
from layers.core.deferred import scan_blocks_deferred
from layers.core.machine import UNLIMITED, choose
from layers.core.numerics import wide
from layers.core.roots import mean_root, reciprocal_factors, where_exact
from layers.core.sharding import on_one_device

BLOCK_BYTES = 1 << 19
"""Of one float32 array in a block of rows, on a CPU: two or three of them stay in a core's cache. An accelerator takes all rows in one."""


@dataclass(frozen=True)
class Over:
    """Where statistics are taken.

    Attributes:
        axes: the axes of x, counted from the end.
        axis_name: a mapped axis of devices that the statistics are shared over.
        groups: subgroups of that axis.
        fast: the variance as E[x²] - E[x]², in one pass, less exact.
    """

    axes: tuple[int, ...] = (-1,)
    axis_name: str | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    fast: bool = False

    def total(self, x: jax.Array) -> jax.Array:
        x = x.sum(self.axes, keepdims=True)
        return x if self.axis_name is None else lax.psum(x, self.axis_name, axis_index_groups=self.groups)

    def weight(self, x: jax.Array, mask: jax.Array | None) -> Any:
        """The weight of each element in its mean: a number, or an array that is 0 where masked."""
        devices = 1 if self.axis_name is None else lax.psum(1, self.axis_name, axis_index_groups=self.groups)
        if mask is None:
            return 1 / max(math.prod(x.shape[a] for a in self.axes) * devices, 1)
        mask = jnp.broadcast_to(mask != 0, x.shape).astype(x.dtype)
        return mask / (jnp.maximum(mask.sum(self.axes, keepdims=True), 1) * devices)

    def by_rows(self) -> bool:
        """Whether each row of the last axis has statistics of its own."""
        return self.axes == (-1,) and self.axis_name is None

    def mean(self, x: jax.Array, weight: Any) -> jax.Array:
        return self.total(x) * weight if isinstance(weight, float) else self.total(weighted(x, weight))

    def centre(self, x: jax.Array, weight: Any) -> jax.Array:
        """The mean, as the first element and the mean of the differences from it: of equal numbers that number, not one beside it."""
        if not isinstance(weight, float) or self.axis_name is not None or x.size == 0 or not on_one_device(x):
            return self.mean(x, weight)
        first = x[tuple(slice(1) if a in self.axes else slice(None) for a in range(-x.ndim, 0))]
        return first + self.total(x - first) * weight

    def root(self, x: jax.Array, weight: Any, epsilon: Any) -> jax.Array:
        """(mean(x²) + epsilon)^1/2."""
        return where_exact(lambda scale: (mean_root(self.mean(jnp.square(_times(x, scale)), weight), epsilon, scale),), x.dtype, epsilon)[0]

    def moments(self, x: jax.Array, weight: Any, epsilon: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, variance and (variance + epsilon)^1/2."""

        def of_multiple(scale: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            mean = (self.mean if self.fast else self.centre)(_times(x, scale), weight)
            var = self.mean(_square(x, None if self.fast else mean, scale), weight)
            var = jnp.maximum(var - mean * mean, 0) if self.fast else var
            return _times(mean, 1 / scale), _times(_times(var, 1 / scale), 1 / scale), mean_root(var, epsilon, scale)

        return where_exact(of_multiple, x.dtype, epsilon)


ROWS = Over()
"""Each row of the last axis for itself."""


def as_computed(x: Any, dtype: Any) -> Any:
    """`x` rounded to the dtype of the layer, where it has one, and widened to that of its sums; None stays None."""
    return None if x is None else x.astype(dtype or x.dtype).astype(wide(dtype or x.dtype))


def standardized(x: jax.Array, mean: Any, root: jax.Array, mask: Any = None) -> jax.Array:
    """x̂ = (x - mean) / root; 0 where the root is, and for what is masked and not finite, so that it gets nowhere. A mean of None is none."""
    first, second = reciprocal_factors(root)
    return _shown(_centred(x, mean, first), second, mask) * second


def standard_factors(x: jax.Array, mean: Any, root: jax.Array, mask: Any = None) -> tuple[jax.Array, jax.Array]:
    """An array c like x and one like root, b, with x̂ = b c b: b g c neither overflows nor underflows where a gradient g times x̂ does not."""
    first, second = reciprocal_factors(root)
    return _shown(_centred(x, mean, first), second, mask), jnp.sqrt(second)


def _centred(x: jax.Array, mean: Any, by: float) -> jax.Array:
    return x * by if mean is None else x * by - mean * by


def _shown(centred: jax.Array, by: jax.Array, mask: Any) -> jax.Array:
    return centred if mask is None else jnp.where((mask != 0) | jnp.isfinite(centred * by), centred, 0)


def by_root(x: jax.Array, root: jax.Array, scale: Any = None) -> jax.Array:
    """scale x / root; 0 where the root is. A scale of None is 1."""
    first, second = reciprocal_factors(root)
    return x * first * (second if scale is None else scale * second)


def through_moments(total: jax.Array, along: jax.Array, xhat: jax.Array, weight: Any) -> jax.Array:
    """w (Σ g + x̂ Σ g x̂), of these two sums. A weight that is a number multiplies them: XLA would write out more whole arrays."""
    if isinstance(weight, float):
        return total * weight + xhat * (along * weight)
    return weighted(total + xhat * along, weight)


def weighted(x: jax.Array, weight: Any) -> jax.Array:
    """`x` times the weight of each element in a mean; 0 for what has none, whatever it is."""
    return x * weight if isinstance(weight, float) else jnp.where(weight == 0, 0, x) * weight


def _is_one(scale: Any) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _times(x: jax.Array, scale: Any) -> jax.Array:
    return x if _is_one(scale) else x * scale


def _square(x: jax.Array, mean: jax.Array | None, scale: Any) -> jax.Array:
    """(scale x - mean)², of which no multiple of x stands elsewhere: XLA would keep a whole array of it."""
    if _is_one(scale):
        return jnp.square(x if mean is None else x - mean)
    if mean is None:
        return (x * (scale / 2)) * (x * (scale * 2))
    return jnp.square((x / 2 - mean / (2 * scale)) * (2 * scale))


def affine(x: jax.Array, scale: Any, bias: Any) -> jax.Array:
    x = x if scale is None else x * scale
    return x if bias is None else x + bias


def factor(scale: Any, offset: float = 0.0, dtype: Any = None) -> Any:
    """What x̂ is multiplied by, as it is computed; None for a scale of None."""
    scale = as_computed(scale, dtype)
    return scale if scale is None or not offset else scale + offset


def sum_to(x: jax.Array, like: Any) -> Any:
    """The sum of `x` over all that a parameter of the shape of `like` was broadcast over; None for None."""
    if like is None:
        return None
    lead = x.ndim - like.ndim
    axes = (*range(lead), *(lead + i for i, n in enumerate(like.shape) if n == 1 and x.shape[lead + i] != 1))
    return x.sum(axes).reshape(like.shape)


def in_row_blocks(grads: Callable[..., tuple[jax.Array, Any]], arrays: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
    """`grads(*rows) -> (dx, sums)` over blocks of rows, the sums of all blocks added.

    Args:
        grads: gives the gradient of the rows, and a pytree of sums over them.
        arrays: cotangents first, (..., features) or (..., 1), all with the same number of rows.
    """
    shape = arrays[0].shape
    rows = [a.reshape(-1, a.shape[-1]) for a in arrays]
    length = rows[0].shape[0]
    block = block_size(length, max(1, choose(BLOCK_BYTES, UNLIMITED) // (4 * max(shape[-1], 1))))
    like = jax.eval_shape(lambda *r: grads(*r)[1], *rows)

    def body(sums: Any, rows: Sequence[jax.Array]) -> tuple[Any, jax.Array]:
        dx, more = grads(*rows)
        return jax.tree.map(jnp.add, sums, more), dx

    sums, dx = scan_blocks_deferred(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like), rows, block=block)
    return dx.reshape(shape), sums


def has_blocks(x: jax.Array) -> bool:
    """Whether `x` has more rows than one block; of a symbolic number there are none."""
    return not is_symbolic_dim(x.size) and x.size * 4 > choose(BLOCK_BYTES, UNLIMITED) and x.size > x.shape[-1]
