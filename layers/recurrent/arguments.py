"""What several recurrent layers ask of their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from layers.core import checks

Inputs = TypeVar("Inputs", bound=tuple[str, ...])


def check_axes(who: str, names: Sequence[str], arrays: Sequence[Any], axes: Sequence[str], sizes: Mapping[str, Any], **beside: Any) -> None:
    """Raises ValueError unless each array has the axes that are written for it, such as "(batch, time)", of these sizes."""
    for name, x, written in zip(names, arrays, axes, strict=True):
        checks.shape(who, name, x, [sizes[a] for a in _words(written)], written, **beside)


def check_inputs(
    who: str, names: Inputs, axes: Inputs, arrays: Sequence[Any], *, required: int, sized: Sequence[str]
) -> tuple[Inputs, dict[str, int]]:
    """The arguments of a state-space model as arrays, of the axes that are written for them; all but the first `required` may be None.

    Returns:
        The arrays, and the size of each axis: that of the arrays in the fields `sized`, of the first that has the axis.

    Raises:
        ValueError: where axes do not fit. TypeError: where an argument is no array of real floats.
    """
    make: Any = type(names)
    x = make(*(checks.array(who, name, v, optional=i >= required) for i, (name, v) in enumerate(zip(names, arrays, strict=True))))
    sizes: dict[str, int] = {}
    for field in sized:
        check_ndim(who, getattr(names, field), getattr(x, field), getattr(axes, field))
        sizes = dict(zip(_words(getattr(axes, field)), getattr(x, field).shape, strict=True)) | sizes
    check_axes(who, names, x, axes, sizes, **{getattr(names, field): getattr(x, field) for field in sized})
    return x, sizes


def _words(axes: str) -> list[str]:
    return axes.strip("(,)").split(", ")


def check_attention(
    who: str,
    q: Any,
    k: Any,
    v: Any,
    scale: Any,
    initial: Any,
    *,
    by_feature: Mapping[str, Any] | None = None,
    by_head: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """The arguments of linear attention as arrays: q, k, v, those for each feature and those for each head, the scale and the initial state."""
    by_feature, by_head = by_feature or {}, by_head or {}
    q, k, v, *others = (checks.array(who, what, x) for what, x in ({"q": q, "k": k, "v": v} | {**by_feature, **by_head}).items())
    check_ndim(who, "q", q, "(batch, time, heads, features)")
    batch, time, heads, features = q.shape
    checks.shape(who, "k", k, q.shape, "the shape of q")
    checks.shape(who, "v", v, (batch, time, heads, *v.shape[-1:]), "(batch, time, heads, values)", q=q)
    for what, x in zip((*by_feature, *by_head), others, strict=True):
        wanted, axes = (q.shape, "the shape of q") if what in by_feature else (q.shape[:3], "(batch, time, heads)")
        checks.shape(who, what, x, wanted, axes, q=q)
    initial = checks.array(who, "initial_state", initial, optional=True)
    checks.shape(who, "initial_state", initial, (batch, heads, features, v.shape[3]), "(batch, heads, features, values)", q=q, v=v)
    return q, k, v, *others, checks.number(who, "scale", scale, traced=True, optional=True), initial


def check_chunk_size(who: str, value: Any) -> int:
    """A power of 2."""
    size = checks.integer(who, "chunk_size", value, "[1, inf)")
    if size & (size - 1):
        raise ValueError(f"{who}: chunk_size is {size}, but must be a power of 2: the halves of a chunk are halved again")
    return size


def check_ndim(who: str, what: str, x: jax.Array, axes: str) -> None:
    """Raises ValueError unless `x` has as many axes as are written."""
    if x.ndim != axes.count(",") + 1:
        raise ValueError(f"{who}: {what} has shape {x.shape}, but must be {axes}; use jax.vmap for further axes")
