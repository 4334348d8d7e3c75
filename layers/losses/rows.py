"""Softmax cross entropy of a block of rows of logits, and its gradient: what every cross entropy here is computed from.

With a the raw logits of a row, c the soft cap, τ the temperature, w the class weights (1 where none), s the label smoothing, V the number of classes:

    z = c tanh(a / c) or a,   lse = log Σ exp(z / τ),   p = exp(z / τ - lse),   H = -Σ p log p

An integer label y gives the target t = (1 - s) w_y [c = y] + s w_c / V, a distribution q gives t = w_c ((1 - s) q_c + s / V). With n what the row
counts, m its weight (n w_y, and n for a distribution) and λ the z-loss:

    loss = -n Σ t log p + m λ lse²
    da   = slope / τ ((n Σ t + 2 m λ lse) dloss p - n dloss t + dlse p - dH p (log p + H)),   slope = 1 - tanh²(a / c)

(Σ t is not 1, because of the weights.) A row with n = 0 is not touched: whatever is in it, its loss is 0, and so is its gradient but for what its own
lse and entropy are asked for. A label that is no class makes its row NaN, loss and gradient. The entropy as a function of z has no other terms in its
gradient: those in which p moves add up to that of H.

Reference: `torch.nn.functional.cross_entropy`; the z-loss of `t5x.losses.cross_entropy_with_logits`; the cap of Gemma 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.numerics import is_known, product, safe_reciprocal
from layers.losses.softmax import Softmax, over
from layers.losses.targets import Options, Targets, reduced


class Rows(NamedTuple):
    """What is found of each row; None where it is not wanted."""

    loss: jax.Array
    softmax: Softmax
    hits: jax.Array | None
    entropy: jax.Array | None
    rank: jax.Array | None

    @classmethod
    def of(cls, a: jax.Array, targets: Targets, class_weights: jax.Array | None, options: Options, softmax: Softmax | None = None) -> Rows:
        """Those of raw logits `a`, and of their softmax where that is known."""
        options = options.of(a.dtype)
        z = cap_logits(a, options)
        softmax = softmax or Softmax.of(z, options.temperature)
        return cls(
            _losses(z, softmax, targets, class_weights, options),
            softmax,
            _hits(a, softmax, targets) if options.return_accuracy else None,
            softmax.entropy(z, options.temperature) if options.return_entropy else None,
            _rank(z, targets) if options.return_rank else None,
        )

    def outputs(self, ctx: Any, targets: Targets, options: Options) -> tuple[Any, ...]:
        """What a rule returns: the loss, reduced; the logsumexp, accuracy, entropy and rank, or None where they are not wanted."""
        hits = self.hits
        if hits is not None and options.reduction != "none":
            hits = hits.sum() * safe_reciprocal(targets.counted.sum())
        ctx.mark_non_differentiable(*(x for x in (hits, self.rank) if x is not None))
        logsumexp = self.softmax.logsumexp(options.temperature) if options.return_logsumexp else None
        return reduced(self.loss, targets, options), logsumexp, hits, self.entropy, self.rank


class Flow(NamedTuple):
    """The gradients that arrive at the logsumexp and at the entropy of each row, and its entropy; None where there are none."""

    logsumexp: jax.Array | None = None
    entropy: jax.Array | None = None
    value: jax.Array | None = None


NO_FLOW = Flow()


def touched(targets: Targets, flow: Flow = NO_FLOW) -> jax.Array:
    """Whether a row counts, or anything that was asked of it has a gradient."""
    found = targets.counted != 0
    for gradient in flow[:2]:
        found = found if gradient is None else found | (gradient != 0)
    return found


def cap_logits(a: jax.Array, options: Options) -> jax.Array:
    cap = options.logit_soft_cap
    return a if cap is None else cap * jnp.tanh(a / cap)


def row_gradients(
    a: jax.Array, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options, flow: Flow = NO_FLOW
) -> jax.Array:
    """da, for the targets multiplied by the gradient of each row's loss."""
    options = options.of(a.dtype)
    s, z = options.label_smoothing, cap_logits(a, options)
    p = softmax.p(z, options.temperature)
    if targets.indexed:
        hit = jnp.arange(a.shape[1], dtype=targets.classes.dtype) == targets.classes[:, None]
        t, total = jnp.where(hit, (1 - s) * targets.weight[:, None], 0), (1 - s) * targets.weight
        if not is_known(s, 0):
            uniform = _uniform(a, class_weights, s)
            t, total = t + targets.counted[:, None] * uniform, total + targets.counted * uniform.sum()
    else:
        t = product(targets.weight[:, None], _of_distribution(targets.classes, class_weights, s, a.dtype))
        total = t.sum(-1)
    total = _with_logsumexp(total, softmax, targets, options, flow)
    da = total[:, None] * p - t
    if flow.entropy is not None and flow.value is not None:
        da = da - flow.entropy[:, None] * product(p, softmax.log_p(z, options.temperature) + flow.value[:, None])
    if options.logit_soft_cap is not None:
        da = da * (1 - jnp.tanh(a / options.logit_soft_cap) ** 2)
    return jnp.where(_idle(softmax, targets, flow)[:, None], 0, over(da, options.temperature))


def plain_factors(softmax: Softmax, targets: Targets, options: Options, flow: Flow = NO_FLOW) -> tuple[jax.Array, jax.Array]:
    """Of each row, f and t in da = f exp(a - largest) - t [c = y]: without smoothing, cap, temperature and the entropy's gradient."""
    idle, total = _idle(softmax, targets, flow), _with_logsumexp(targets.weight, softmax, targets, options, flow)
    return jnp.where(idle, 0, total / softmax.total), jnp.where(idle, 0, targets.weight)


def _with_logsumexp(total: jax.Array, softmax: Softmax, targets: Targets, options: Options, flow: Flow) -> jax.Array:
    """The factor of p, with what the z-loss and the gradient of the logsumexp add."""
    if not is_known(options.z_loss, 0):
        lse = softmax.logsumexp(options.temperature)
        total = total + 2 * options.z_loss * targets.weight * jnp.where(jnp.isinf(lse), 0, lse)
    return total if flow.logsumexp is None else total + flow.logsumexp


def _idle(softmax: Softmax, targets: Targets, flow: Flow) -> jax.Array:
    """Which rows have no gradient, whatever is in them."""
    return ~jnp.isfinite(softmax.total) & ~touched(targets, flow)


def label_gradients(a: jax.Array, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options) -> jax.Array:
    """dq of rows whose targets are distributions."""
    options = options.of(a.dtype)
    log_p = softmax.log_p(cap_logits(a, options), options.temperature)
    dt = product(-(1 - options.label_smoothing) * targets.weight[:, None], log_p)
    return dt if class_weights is None else product(class_weights.astype(a.dtype), dt)


def row_tangents(
    a: jax.Array,
    da: jax.Array,
    dq: jax.Array | None,
    found: tuple[Softmax, jax.Array | None],
    targets: Targets,
    class_weights: jax.Array | None,
    options: Options,
) -> tuple[jax.Array | None, ...]:
    """The tangents of each row's loss, logsumexp and entropy, from those of the logits and, unless None, of distributions as targets.

    found: the softmax of each row, and its entropy.
    """
    softmax, entropy = found
    nothing, one = targets.times(jnp.zeros_like(softmax.total)), jnp.ones_like(softmax.total)

    def along(targets: Targets, flow: Flow) -> jax.Array:
        return product(row_gradients(a, softmax, targets, class_weights, options, flow), da).sum(-1)

    dloss = along(targets, NO_FLOW)
    if dq is not None:
        slope = label_gradients(a, softmax, targets, class_weights, options)
        dloss = dloss + jnp.where(slope == 0, 0, product(dq, slope)).sum(-1)
    dlse = along(nothing, Flow(logsumexp=one)) if options.return_logsumexp else None
    return dloss, dlse, None if entropy is None else along(nothing, Flow(entropy=one, value=entropy))


def _losses(z: jax.Array, softmax: Softmax, targets: Targets, class_weights: jax.Array | None, options: Options) -> jax.Array:
    s = options.label_smoothing
    if targets.indexed:
        of_class = jnp.take_along_axis(z, targets.classes[:, None], axis=1)
        loss = (1 - s) * product(targets.weight, -softmax.log_p(of_class, options.temperature)[:, 0])
        if not is_known(s, 0):
            loss = loss + product(targets.counted, _against(_uniform(z, class_weights, s), softmax.log_p(z, options.temperature)))
    else:
        t = _of_distribution(targets.classes, class_weights, s, z.dtype)
        loss = product(targets.weight, _against(t, softmax.log_p(z, options.temperature)))
    if not is_known(options.z_loss, 0):
        loss = loss + options.z_loss * product(targets.weight, softmax.logsumexp(options.temperature) ** 2)
    return loss


def _hits(a: jax.Array, softmax: Softmax, targets: Targets) -> jax.Array:
    """What a row counts, if its largest logit is that of its target and none is NaN, else 0; NaN for a label that is no class."""
    wanted = targets.classes if targets.indexed else targets.classes.argmax(-1)
    return lax.stop_gradient(targets.counted * ((a.argmax(-1) == wanted) & ~jnp.isnan(softmax.largest)))


def _rank(z: jax.Array, targets: Targets) -> jax.Array:
    """How many classes have a larger score than the target, or one that is NaN; all others where its own is; -1 for a row that does not count."""
    of_class = jnp.take_along_axis(z, targets.classes[:, None], axis=1)
    above = jnp.minimum((~(z <= of_class)).sum(-1, dtype=jnp.int32), z.shape[1] - 1)
    return jnp.where(targets.counted == 0, -1, above)


def _uniform(a: jax.Array, class_weights: jax.Array | None, s: Any) -> jax.Array:
    """The part of a target that label smoothing adds."""
    share = s / a.shape[1]
    return jnp.full(a.shape[1:], share, a.dtype) if class_weights is None else share * class_weights.astype(a.dtype)


def _of_distribution(q: jax.Array, class_weights: jax.Array | None, s: Any, dtype: Any) -> jax.Array:
    t = (1 - s) * q.astype(dtype) + s / max(q.shape[1], 1)
    return t if class_weights is None else t * class_weights.astype(dtype)


def _against(t: jax.Array, log_p: jax.Array) -> jax.Array:
    """-Σ t log_p, where 0 times anything is 0."""
    return -product(t, log_p).sum(-1)
