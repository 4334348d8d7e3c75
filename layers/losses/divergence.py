"""The generalised Jensen-Shannon divergence of rows of logits, and its gradient: the formulas of `linear_jsd`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.numerics import product
from layers.losses.softmax import Softmax, over


@partial(jax.tree_util.register_dataclass, data_fields=("temperature",), meta_fields=("beta", "reduction", "block_size"))
@dataclass(frozen=True)
class Options:
    """The options of the divergences. The temperature may be an array, without a gradient; the others are known."""

    beta: float = 0.5
    temperature: Any = 1.0
    reduction: str = "mean"
    block_size: int | None = None

    def of(self, dtype: Any) -> Options:
        """With a temperature of this dtype, where it is an array."""
        return jax.tree.map(lambda x: x.astype(dtype) if isinstance(x, jax.Array) else x, self)


class Stats(NamedTuple):
    """What the gradient of each row needs: both normalisers, and Σ q log(q / m)."""

    student: Softmax
    teacher: Softmax
    of_student: jax.Array


def divergences(a: jax.Array, b: jax.Array, options: Options) -> tuple[jax.Array, Stats]:
    """The divergence of each row of the student's logits `a` from the teacher's `b`."""
    b, beta, temperature = b.astype(a.dtype), options.beta, options.of(a.dtype).temperature
    student, teacher = Softmax.of(a, temperature), Softmax.of(b, temperature)
    log_q, log_p = student.log_p(a, temperature), teacher.log_p(b, temperature)
    log_m = _log_mixture(log_q, log_p, beta)
    of_teacher = product(jnp.exp(log_p), log_p - log_m).sum(-1)
    of_student = product(jnp.exp(log_q), log_q - log_m).sum(-1)
    weights = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
    return weights[0] * of_teacher + weights[1] * of_student, Stats(student, teacher, of_student)


def divergence_gradients(a: jax.Array, b: jax.Array, stats: Stats, weight: jax.Array, options: Options) -> jax.Array:
    """da, times the weight of each row."""
    b, beta, temperature = b.astype(a.dtype), options.beta, options.of(a.dtype).temperature
    log_q, log_p = stats.student.log_p(a, temperature), stats.teacher.log_p(b, temperature)
    weight = over(weight[:, None], temperature)
    if beta == 0:
        return product(weight, jnp.exp(log_q) - jnp.exp(log_p))
    share = 1 if beta == 1 else 1 - beta
    return product(weight * share, product(jnp.exp(log_q), log_q - _log_mixture(log_q, log_p, beta) - stats.of_student[:, None]))


def _log_mixture(log_q: jax.Array, log_p: jax.Array, beta: float) -> jax.Array:
    if beta == 0:
        return log_q
    if beta == 1:
        return jnp.maximum(log_p, jnp.finfo(log_p.dtype).min / 4)  # of a class that the teacher excludes: huge, and finite
    return jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
