"""What the rows of a cross entropy are to be, and how their losses are reduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.numerics import safe_reciprocal

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Options:
    """What is known when the program is traced: the options of the cross entropies."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_soft_cap: float | None = None
    reduction: str = "mean"
    return_logsumexp: bool = False
    return_accuracy: bool = False
    block_size: int | None = None


class Targets(NamedTuple):
    """What the rows are to be.

    Attributes:
        classes: (rows,) the class of each row, 0 where it has none; or (rows, vocab) its distribution.
        weight: (rows,) m: 0 where ignored, NaN for a label that is no class.
        counted: (rows,) the same without class weights.
    """

    classes: jax.Array
    weight: jax.Array
    counted: jax.Array

    @property
    def indexed(self) -> bool:
        return self.classes.ndim == 1

    def times(self, factor: jax.Array) -> Targets:
        """With the loss of each row multiplied by `factor`."""
        return self._replace(weight=self.weight * factor, counted=self.counted * factor)


def read_labels(labels: jax.Array, class_weights: jax.Array | None, vocab: int, options: Options, dtype: Any) -> Targets:
    """The targets that labels, one or one distribution a row, stand for."""
    if labels.ndim == 2:
        ones = jnp.ones(labels.shape[:1], dtype)
        return Targets(labels, ones, ones)
    kept, inside = labels != options.ignore_index, (labels >= 0) & (labels < vocab)
    counted = jnp.where(kept, jnp.where(inside, 1, jnp.nan), 0).astype(dtype)
    classes = jnp.where(kept & inside, labels, 0)
    return Targets(classes, counted if class_weights is None else counted * class_weights.astype(dtype)[classes], counted)


def scale_of(targets: Targets, options: Options) -> jax.Array | None:
    """What the sum over rows is multiplied by; None for 1. The mean of nothing is 0."""
    if options.reduction != "mean":
        return None
    return safe_reciprocal(targets.weight.sum())


def reduced(loss: jax.Array, targets: Targets, options: Options) -> jax.Array:
    """The mean or sum of the rows' losses, or these."""
    if options.reduction == "none":
        return loss
    scale = scale_of(targets, options)
    return loss.sum() if scale is None else loss.sum() * scale
