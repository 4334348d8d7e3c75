"""What the losses ask of their arguments, and the shapes they come in: one row after another inside, any batch axes outside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layers.core import compat
from layers.core.checks import check_block_size, check_floating
from layers.losses.targets import REDUCTIONS, Options


def read_options(name: str, **options: Any) -> Options:
    """The options, checked."""
    given = Options(**options)
    refuse_traced(name, **options)
    if not isinstance(given.ignore_index, (int, np.integer)):
        raise TypeError(f"{name}: ignore_index is {given.ignore_index!r}, but must be an integer")
    check_reduction(name, given.reduction)
    check_block_size(name, given.block_size)
    if not 0 <= given.label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {given.label_smoothing}, but must lie in [0, 1]")
    if given.z_loss < 0:
        raise ValueError(f"{name}: z_loss is {given.z_loss}, but must not be negative")
    if given.logit_soft_cap is not None and not given.logit_soft_cap > 0:
        raise ValueError(f"{name}: logit_soft_cap is {given.logit_soft_cap}, but must be positive: None is for no cap")
    return given


def refuse_traced(name: str, **options: Any) -> None:
    """Raises for an option that is a traced array: options are part of the program."""
    for key, value in options.items():
        if isinstance(value, compat.Tracer):
            raise TypeError(f"{name}: {key} is traced, but is part of the program: pass a Python number (static_argnames of jax.jit)")


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}, but must be one of {', '.join(REDUCTIONS)}")


def check_head(name: str, x: Any, kernel: Any, bias: Any, prefix: str = "") -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The arrays of a linear head, checked; `prefix` goes before their names in errors."""
    x, kernel, bias = jnp.asarray(x), jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    check_floating(name, **{f"{prefix}{key}": a for key, a in (("x", x), ("kernel", kernel), ("bias", bias)) if a is not None})
    if kernel.ndim != 2 or kernel.shape[1] == 0:
        raise ValueError(f"{name}: {prefix}kernel has shape {kernel.shape}, but must be (features, vocab), with at least one class")
    if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
        hint = ": transpose it, kernel.T" if x.ndim and x.shape[-1] == kernel.shape[1] else ""
        raise ValueError(f"{name}: {prefix}x has shape {x.shape}, but {prefix}kernel (features, vocab) has shape {kernel.shape}{hint}")
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"{name}: {prefix}bias has shape {bias.shape}, but {prefix}kernel (features, vocab) has shape {kernel.shape}")
    return x, kernel, bias


def check_labels(name: str, labels: Any, class_weights: Any, batch: tuple[int, ...], vocab: int) -> tuple[jax.Array, jax.Array | None]:
    """Labels and class weights, checked; the weights as constants."""
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)  # a narrow dtype holds neither vocab nor ignore_index
    shape = (*batch, vocab) if jnp.issubdtype(labels.dtype, jnp.floating) else batch
    if not jnp.issubdtype(labels.dtype, jnp.floating) and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: labels are of dtype {labels.dtype}, but must be integers (classes) or floating-point (distributions)")
    if labels.shape != shape:
        kind = "distributions must have shape (*batch, vocab)" if len(shape) > len(batch) else "classes must have shape (*batch)"
        raise ValueError(f"{name}: labels have dtype {labels.dtype} and shape {labels.shape}, but {kind} = {shape}")
    if class_weights is None:
        return labels, None
    class_weights = jnp.asarray(class_weights)
    if not (jnp.issubdtype(class_weights.dtype, jnp.floating) or jnp.issubdtype(class_weights.dtype, jnp.integer)):
        raise TypeError(f"{name}: class_weights are of dtype {class_weights.dtype}, but must be real numbers")
    if class_weights.shape != (vocab,):
        raise ValueError(f"{name}: class_weights have shape {class_weights.shape}, but must be (vocab,) = ({vocab},)")
    return labels, lax.stop_gradient(class_weights)


def as_batch(outputs: Any, batch: tuple[int, ...]) -> Any:
    """What a rule returned, without what is None, the rows in their batch axes; one array is itself."""
    shaped = [y.reshape(*batch, *y.shape[1:]) if y.ndim else y for y in outputs if y is not None]
    return shaped[0] if len(shaped) == 1 else tuple(shaped)
