"""What the rows of a cross entropy are to be, how much each counts, and how their losses are reduced."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.numerics import product, safe_reciprocal

REDUCTIONS = ("mean", "sum", "none")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("label_smoothing", "z_loss", "logit_soft_cap", "temperature"),
    meta_fields=("ignore_index", "reduction", "return_logsumexp", "return_accuracy", "return_entropy", "return_rank", "block_size", "implementation"),
)
@dataclass(frozen=True)
class Options:
    """The options of the cross entropies. Numbers that only arithmetic needs may be arrays, without a gradient; the others are known."""

    ignore_index: int = -100
    label_smoothing: Any = 0.0
    z_loss: Any = 0.0
    logit_soft_cap: Any = None
    temperature: Any = 1.0
    reduction: str = "mean"
    return_logsumexp: bool = False
    return_accuracy: bool = False
    return_entropy: bool = False
    return_rank: bool = False
    block_size: int | None = None
    implementation: str = "xla"

    def of(self, dtype: Any) -> Options:
        """With arrays of this dtype."""
        return jax.tree.map(lambda x: x.astype(dtype) if isinstance(x, jax.Array) else x, self)

    @property
    def one_number(self) -> bool:
        """Whether one number is all that has a gradient."""
        return self.reduction != "none" and not self.return_logsumexp and not self.return_entropy


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
        """With the loss of each row that counts multiplied by `factor`."""
        return self._replace(weight=product(self.weight, factor), counted=product(self.counted, factor))


class Labels(NamedTuple):
    """What targets are read from: labels, one or one distribution a row; weights of the classes and of the rows, or None."""

    given: jax.Array
    class_weights: jax.Array | None = None
    where: jax.Array | None = None

    def read(self, vocab: int, options: Options, dtype: Any) -> Targets:
        labels, class_weights, where = self
        counted = jnp.ones(labels.shape[:1], dtype) if where is None else where.astype(dtype)
        if labels.ndim == 2:
            return Targets(labels, counted, counted)
        kept, inside = labels != options.ignore_index, (labels >= 0) & (labels < vocab)
        counted = jnp.where(kept, product(counted, jnp.where(inside, 1, jnp.nan).astype(dtype)), 0)
        classes = jnp.where(kept & inside, labels, 0)
        return Targets(classes, counted if class_weights is None else product(counted, class_weights.astype(dtype)[classes]), counted)


def mean(x: jax.Array, weight: jax.Array, axis: int | None = None) -> jax.Array:
    """The mean of what counts; 0 where nothing does."""
    return product(weight, x).sum(axis) * safe_reciprocal(weight.sum(axis))


def reduce_weighted(loss: jax.Array, weight: jax.Array, reduction: str) -> jax.Array:
    """The mean by the weights, the sum of losses times weights, or these."""
    if reduction == "mean":
        return mean(loss, weight)
    weighted = product(weight, loss)
    return weighted if reduction == "none" else weighted.sum()


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
