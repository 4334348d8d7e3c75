"""Flax's Linen normalisations, with the backward pass of this library's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen

from layers.linen.twin import twin
from layers.norms.batch_norm import BatchNorm as _BatchNorm
from layers.norms.group_norm import GroupNorm as _GroupNorm
from layers.norms.layer_norm import LayerNorm as _LayerNorm
from layers.norms.rms_norm import RMSNorm as _RMSNorm


class LayerNorm(linen.LayerNorm):
    """`flax.linen.LayerNorm`: the same arguments, parameters and values; backward keeps two numbers a row beyond the input."""

    @linen.compact
    def __call__(self, x: Any, *, mask: Any = None) -> Any:
        if _is_flax_s(self, x):
            return super().__call__(x, mask=mask)
        return twin(_LayerNorm, self, **_parameters(self, x, self.feature_axes))(x, mask=mask)


class RMSNorm(linen.RMSNorm):
    """`flax.linen.RMSNorm`: the same arguments, parameters and values; backward keeps one number a row beyond the input."""

    @linen.compact
    def __call__(self, x: Any, *, mask: Any = None) -> Any:
        if _is_flax_s(self, x):
            return super().__call__(x, mask=mask)
        return twin(_RMSNorm, self, **_parameters(self, x, self.feature_axes))(x, mask=mask)


class GroupNorm(linen.GroupNorm):
    """`flax.linen.GroupNorm`: the same arguments, parameters and values; backward keeps two numbers a group beyond the input."""

    @linen.compact
    def __call__(self, x: Any, *, mask: Any = None) -> Any:
        features, groups, size = jnp.shape(x)[-1], self.num_groups, self.group_size
        if groups is None and size:
            groups = features // size if features % size == 0 else None
        elif size is not None:
            groups = None
        if not groups or features % groups or _is_flax_s(self, x):
            return super().__call__(x, mask=mask)
        return twin(_GroupNorm, self, num_groups=groups, **_parameters(self, x, -1))(x, mask=mask)


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm`: the same arguments, variables and values; backward keeps two numbers a feature beyond the input."""

    @linen.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        stored = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        if stored or self.is_initializing() or _is_flax_s(self, x):
            return super().__call__(x, None if use_running_average is None else stored, mask=mask)
        shape = [jnp.shape(x)[a] for a in _axes(self.axis)]
        running = {name: self.variable("batch_stats", name, make, shape, jnp.float32) for name, make in (("mean", jnp.zeros), ("var", jnp.ones))}
        values = {name: jnp.asarray(variable.value).reshape(-1) for name, variable in running.items()}
        layer = twin(_BatchNorm, self, use_running_average=False, **values, **_parameters(self, x, self.axis))
        y = layer(x, mask=mask)
        for name, variable in running.items():
            variable.value = getattr(layer, name)[...].reshape(shape)
        return y


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _parameters(module: Any, x: Any, axes: Any) -> dict[str, Any]:
    """`scale` and `bias` of the sizes of the feature axes of x, in the order in which Flax makes them; None where there is none."""
    shape = [jnp.shape(x)[a] for a in sorted(a % jnp.ndim(x) for a in _axes(axes))]
    made: dict[str, Any] = {"scale": None, "bias": None}
    for name in made:
        if getattr(module, f"use_{name}", False):
            made[name] = jnp.asarray(module.param(name, getattr(module, f"{name}_init"), shape, module.param_dtype))
    return made


def _is_flax_s(module: Any, x: Any) -> bool:
    """Whether Flax's code serves a call: complex inputs, and statistics that are asked for in 16 bits."""
    return not module.force_float32_reductions or jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
