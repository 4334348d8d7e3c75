"""The softmax of rows of logits and their gradient by a kernel, with the derivatives of what XLA computes.

In the names of `rows.py`. Without smoothing, cap and temperature the gradient of a row is f exp(a - largest) - t [c = y], with two numbers a row; all
else of the loss needs those of the softmax and the label's logit only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layers.core.compat import varies
from layers.core.numerics import is_known, wide
from layers.core.sharding import mesh_of
from layers.core.stand_in import merging_batches, stand_in
from layers.kernels.cross_entropy import KERNELS, CrossEntropyCall
from layers.losses.rows import Flow, plain_factors
from layers.losses.softmax import Softmax
from layers.losses.targets import Labels, Options, Targets


def describe(logits: jax.Array, labels: Labels, options: Options) -> CrossEntropyCall:
    """What a kernel is told of a call."""
    needs = {
        "distributions as targets": labels.given.ndim == 2,
        "label smoothing": not is_known(options.label_smoothing, 0),
        "soft cap": options.logit_soft_cap is not None,
        "temperature": not is_known(options.temperature, 1),
        "accuracy": options.return_accuracy,
        "entropy": options.return_entropy,
    }
    given = tuple(name for name, holds in needs.items() if holds)
    return CrossEntropyCall(logits.shape, str(logits.dtype), given, varies((logits, labels)), mesh_of(logits, labels.given))


def softmax(logits: jax.Array, implementation: str) -> Softmax:
    """That of each row."""

    def by_xla(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = Softmax.of(logits.astype(wide(logits.dtype)))
        return found.largest, found.total

    kernel = KERNELS[implementation].forward
    return Softmax(*stand_in(kernel, by_xla, (logits,), merging_batches(kernel, by_xla)))


def gradients(logits: jax.Array, softmax: Softmax, targets: Targets, options: Options, flow: Flow) -> jax.Array:
    """dlogits, for the targets multiplied by the gradient of each row's loss."""
    factor, hit = plain_factors(softmax, targets, options, flow)

    def by_xla(logits: jax.Array, largest: jax.Array, factor: jax.Array, hit: jax.Array, classes: jax.Array) -> jax.Array:
        z = logits.astype(largest.dtype)
        share = Softmax(largest, jnp.ones_like(largest)).p(z)
        is_class = jnp.arange(z.shape[1]) == classes[:, None]
        return (jnp.where(factor[:, None] == 0, 0, factor[:, None] * share) - jnp.where(is_class, hit[:, None], 0)).astype(logits.dtype)

    kernel = KERNELS[options.implementation].backward
    arrays = logits, softmax.largest, factor, hit, targets.classes
    return stand_in(kernel, by_xla, arrays, merging_batches(kernel, by_xla))
