"""Softmax cross entropy of a block of rows of logits, and its gradient: what every cross entropy here is computed from.

With a the raw logits of a row, c the soft cap, w the class weights (1 where none), s the label smoothing, V the number of classes:

    z = c tanh(a / c) or a,   lse = log Σ exp(z),   p = exp(z - lse)

An integer label y gives the target t = (1 - s) w_y [c = y] + s w_c / V, a distribution q gives t = w_c ((1 - s) q_c + s / V). With m the
weight of the row (w_y, and 1 for a distribution) and λ the z-loss:

    loss = -Σ t (z - lse) + m λ lse²
    da   = slope ((Σ t + 2 m λ lse) dloss p - dloss t + dlse p),   slope = 1 - tanh²(a / c)

(Σ t is not 1, because of the weights.) Everything is computed from z - max, so that no digits are lost in large logits. A row whose largest
logit is infinite is taken to its limit: the classes that reach it share all the probability. A row that is ignored has m = t = 0; a label
that is no class makes its row NaN, loss and gradient.

Reference: `torch.nn.functional.cross_entropy`; the z-loss of `t5x.losses.cross_entropy_with_logits`; the cap of Gemma 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.numerics import safe_reciprocal
from layers.losses.targets import Options, Targets, reduced


class Softmax(NamedTuple):
    """The largest logit of each row, and Σ exp(logit - largest): together the logsumexp."""

    largest: jax.Array
    total: jax.Array

    @property
    def log_sum(self) -> jax.Array:
        return jnp.log(self.total)

    @property
    def logsumexp(self) -> jax.Array:
        return self.largest + self.log_sum


def cap_logits(a: jax.Array, options: Options) -> jax.Array:
    cap = options.logit_soft_cap
    return a if cap is None else cap * jnp.tanh(a / cap)


def softmax_of(z: jax.Array) -> Softmax:
    """The normaliser of rows of logits."""
    largest = lax.stop_gradient(z.max(-1))
    return Softmax(largest, jnp.exp(_shifted(z, largest[:, None])).sum(-1))


def outputs(ctx: Any, loss: jax.Array, softmax: Softmax, hits: jax.Array | None, targets: Targets, options: Options) -> tuple[Any, ...]:
    """What a rule returns: the loss, reduced; the logsumexp and the accuracy, or None where they are not wanted."""
    accuracy = hits
    if hits is not None and options.reduction != "none":
        accuracy = hits.sum() * safe_reciprocal(targets.counted.sum())
    if accuracy is not None:
        ctx.mark_non_differentiable(accuracy)
    return reduced(loss, targets, options), softmax.logsumexp if options.return_logsumexp else None, accuracy


def log_softmax(z: jax.Array, softmax: Softmax) -> jax.Array:
    """log p of rows of logits."""
    return _shifted(z, softmax.largest[:, None]) - softmax.log_sum[:, None]


def _shifted(z: jax.Array, largest: jax.Array) -> jax.Array:
    """z - largest, in its limit where that is infinite."""
    infinite = jnp.isinf(largest)
    return jnp.where(infinite, jnp.where(z == largest, 0, -jnp.inf), z) - jnp.where(infinite, 0, largest)


def row_losses(a: jax.Array, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options) -> jax.Array:
    """The loss of each row of raw logits `a`."""
    s, largest, log_sum = options.label_smoothing, softmax.largest[:, None], softmax.log_sum
    if targets.indexed:
        of_class = jnp.take_along_axis(a, targets.classes[:, None], axis=1)
        nll = log_sum - _shifted(cap_logits(of_class, options), largest)[:, 0]
        loss = (1 - s) * product(targets.weight, nll)
        if s:
            loss = loss + targets.counted * _against(_uniform(a, class_weights, s), _log_p(a, softmax, options))
    else:
        t = _of_distribution(targets.classes, class_weights, s, a.dtype)
        loss = targets.weight * _against(t, _log_p(a, softmax, options))
    if options.z_loss:
        loss = loss + options.z_loss * product(targets.weight, softmax.logsumexp**2)
    return loss


def row_gradients(
    a: jax.Array, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options, dlse: jax.Array | None = None
) -> jax.Array:
    """da, for the targets multiplied by the gradient of each row's loss."""
    s, lse = options.label_smoothing, softmax.logsumexp
    p = jnp.exp(_shifted(cap_logits(a, options), softmax.largest[:, None])) * (1 / softmax.total)[:, None]
    if targets.indexed:
        hit = jnp.arange(a.shape[1], dtype=targets.classes.dtype) == targets.classes[:, None]
        t, total = jnp.where(hit, (1 - s) * targets.weight[:, None], 0), (1 - s) * targets.weight
        if s:
            uniform = _uniform(a, class_weights, s)
            t, total = t + targets.counted[:, None] * uniform, total + targets.counted * uniform.sum()
    else:
        t = targets.weight[:, None] * _of_distribution(targets.classes, class_weights, s, a.dtype)
        total = t.sum(-1)
    if options.z_loss:
        total = total + 2 * options.z_loss * targets.weight * jnp.where(jnp.isinf(lse), 0, lse)
    if dlse is not None:
        total = total + dlse
    da = total[:, None] * p - t
    if options.logit_soft_cap is not None:
        da = da * (1 - jnp.tanh(a / options.logit_soft_cap) ** 2)
    return da


def label_gradients(a: jax.Array, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options) -> jax.Array:
    """dq of rows whose targets are distributions."""
    dt = -targets.weight[:, None] * (1 - options.label_smoothing) * _log_p(a, softmax, options)
    return dt if class_weights is None else dt * class_weights.astype(a.dtype)


def row_tangents(
    a: jax.Array, da: jax.Array, dq: jax.Array | None, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The tangents of each row's loss and logsumexp, from those of the logits and, unless None, of distributions as targets."""
    dloss = (row_gradients(a, softmax, targets, class_weights, options) * da).sum(-1)
    if dq is not None:
        dloss = dloss + (label_gradients(a, softmax, targets, class_weights, options) * dq).sum(-1)
    one = jnp.ones_like(softmax.total)
    return dloss, (row_gradients(a, softmax, targets.times(jnp.zeros_like(one)), class_weights, options, one) * da).sum(-1)


def row_hits(a: jax.Array, targets: Targets) -> jax.Array:
    """1 for a row whose largest logit is that of its target, else 0; NaN for a label that is no class."""
    wanted = targets.classes if targets.indexed else targets.classes.argmax(-1)
    return lax.stop_gradient(targets.counted * (a.argmax(-1) == wanted))


def _log_p(a: jax.Array, softmax: Softmax, options: Options) -> jax.Array:
    return log_softmax(cap_logits(a, options), softmax)


def _uniform(a: jax.Array, class_weights: jax.Array | None, s: float) -> jax.Array:
    """The part of a target that label smoothing adds."""
    share = s / a.shape[1]
    return jnp.full(a.shape[1:], share, a.dtype) if class_weights is None else share * class_weights.astype(a.dtype)


def _of_distribution(q: jax.Array, class_weights: jax.Array | None, s: float, dtype: Any) -> jax.Array:
    t = (1 - s) * q.astype(dtype) + s / max(q.shape[1], 1)
    return t if class_weights is None else t * class_weights.astype(dtype)


def _against(t: jax.Array, log_p: jax.Array) -> jax.Array:
    """-Σ t log_p, where 0 times anything is 0."""
    return -product(t, log_p).sum(-1)


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight x, and 0 where weight is 0, whatever x is."""
    zero = weight == 0
    return jnp.where(zero, 0, weight * jnp.where(zero, 1, x))
