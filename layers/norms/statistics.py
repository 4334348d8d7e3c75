"""What every normalisation shares: weighted sums over axes and devices, the gradient they give the input, loops over rows.

With x̂ = (x - mean) rstd, w the weight of an element in its mean (1 / n, and 0 where masked) and g the cotangent of x̂,

    mean = Σ w x,  var = Σ w (x - mean)²,  rstd = (var + epsilon)^-1/2
    dvar = -½ rstd² Σ g x̂,   dmean = -rstd Σ g                     (Σ w (x - mean) = 0, so mean does not act through var)
    dx   = rstd (g - w (Σ g + x̂ Σ g x̂))

and without the term Σ g where the mean is not subtracted. Sums go over the axes, and over the devices of a named axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jax import lax
from jax.export import is_symbolic_dim

from layers.core.blocks import block_size
from layers.core.checks import check_floating
from layers.core.late import scan_blocks_late
from layers.core.machine import UNLIMITED, choose
from layers.core.numerics import wide

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
        mask = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
        return mask / (jnp.maximum(mask.sum(self.axes, keepdims=True), 1) * devices)

    def by_rows(self) -> bool:
        """Whether each row of the last axis has statistics of its own."""
        return self.axes == (-1,) and self.axis_name is None

    def mean(self, x: jax.Array, weight: Any) -> jax.Array:
        return self.total(x) * weight if isinstance(weight, float) else self.total(jnp.where(weight == 0, 0, x) * weight)

    def mean_square(self, x: jax.Array, weight: Any) -> jax.Array:
        return self.mean(x * x, weight)

    def moments(self, x: jax.Array, weight: Any) -> tuple[jax.Array, jax.Array]:
        """Mean and variance."""
        mean = self.mean(x, weight)
        if self.fast:
            return mean, jnp.maximum(self.mean_square(x, weight) - mean * mean, 0)
        return mean, self.mean_square(x - mean, weight)


ROWS = Over()
"""Each row of the last axis for itself."""


def as_computed(x: Any, dtype: Any) -> Any:
    """`x` rounded to the dtype of the layer, where it has one, and widened to that of its sums; None stays None."""
    return None if x is None else x.astype(dtype or x.dtype).astype(wide(dtype or x.dtype))


def affine(x: jax.Array, scale: Any, bias: Any) -> jax.Array:
    x = x if scale is None else x * scale
    return x if bias is None else x + bias


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

    sums, dx = scan_blocks_late(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like), rows, block=block)
    return dx.reshape(shape), sums


def has_blocks(x: jax.Array) -> bool:
    """Whether `x` has more rows than one block; of a symbolic number there are none."""
    return not is_symbolic_dim(x.size) and x.size * 4 > choose(BLOCK_BYTES, UNLIMITED) and x.size > x.shape[-1]


def check_features(name: str, x: Any, **parameters: Any) -> None:
    """Raises unless x is real and floating, with a last axis, and each parameter is None or has the shape of that axis."""
    check_floating(name, x=x)
    if x.ndim == 0:
        raise ValueError(f"{name}: x is a scalar, but needs a last axis of features")
    for key, value in parameters.items():
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {key} has shape {value.shape}, but the last axis of x is {x.shape[-1]} (x: {x.shape})")


def check_sum(name: str, x: Any, residual: Any, **parameters: Any) -> None:
    """Raises unless x and the residual can be added without broadcasting and the parameters fit."""
    check_features(name, x, **parameters)
    if residual.shape != x.shape:
        raise ValueError(f"{name}: residual has shape {residual.shape}, but x has shape {x.shape}: broadcast one to the other")
    check_floating(name, residual=residual)


def check_epsilon(name: str, epsilon: float) -> None:
    if epsilon < 0:
        raise ValueError(f"{name}: epsilon is {epsilon}, but must not be negative")


def module_over(module: Any, ndim: int, axes: Any) -> Over:
    """The statistics that an nnx normalisation asks for."""
    groups = None if module.axis_index_groups is None else tuple(tuple(g) for g in module.axis_index_groups)
    return Over(from_the_end(ndim, axes), module.axis_name, groups, bool(module.use_fast_variance))


def from_the_end(ndim: int, axes: Any) -> tuple[int, ...]:
    """Axes as sorted negative numbers."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for an input of {ndim} axes")
    return tuple(sorted({a - ndim if a >= 0 else a for a in axes}))


def promoted(module: Any, x: jax.Array, *parameters: Any) -> tuple[Any, list[Any], Any]:
    """The input and the parameters of an nnx normalisation, and the dtype it computes in.

    Flax's own promotion is left to the layer, so that the arrays kept for backward are those that are alive anyway.
    """
    values = [None if p is None else p[...] for p in parameters]
    if module.promote_dtype is not dtypes.promote_dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        x, *values = module.promote_dtype((x, *values), dtype=module.dtype)
    dtype = dtypes.canonicalize_dtype(x, *values, dtype=module.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{type(module).__name__}: the input has dtype {dtype}, but a real floating-point dtype is needed: use Flax's own")
    return x, values, dtype


def along(x: jax.Array, feature_axes: Any, parameter: Any) -> Any:
    """A parameter reshaped to broadcast against x along its feature axes."""
    if parameter is None:
        return None
    axes = from_the_end(x.ndim, feature_axes)
    return parameter.reshape([x.shape[a] if a in axes else 1 for a in range(min(axes), 0)])
