"""The generalised Jensen-Shannon divergence of rows of logits, and its gradient: the formulas of `linear_jsd`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.core.numerics import product
from layers.losses.softmax import Softmax


@dataclass(frozen=True)
class Options:
    """What is known when the program is traced: the options of the divergences."""

    beta: float = 0.5
    temperature: float = 1.0
    reduction: str = "mean"
    block_size: int | None = None


class Stats(NamedTuple):
    """What the gradient of each row needs: both normalisers, and Σ q log(q / m)."""

    student: Softmax
    teacher: Softmax
    of_student: jax.Array


def divergences(a: jax.Array, b: jax.Array, options: Options) -> tuple[jax.Array, Stats]:
    """The divergence of each row of the student's logits `a` from the teacher's `b`."""
    b, beta, temperature = b.astype(a.dtype), options.beta, options.temperature
    student, teacher = Softmax.of(a, temperature), Softmax.of(b, temperature)
    log_q, log_p = student.log_p(a, temperature), teacher.log_p(b, temperature)
    log_m = _log_mixture(log_q, log_p, beta)
    of_teacher = product(jnp.exp(log_p), log_p - log_m).sum(-1)
    of_student = product(jnp.exp(log_q), log_q - log_m).sum(-1)
    weights = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
    return weights[0] * of_teacher + weights[1] * of_student, Stats(student, teacher, of_student)


def divergence_gradients(a: jax.Array, b: jax.Array, stats: Stats, weight: jax.Array, options: Options) -> jax.Array:
    """da, times the weight of each row."""
    b, beta, temperature = b.astype(a.dtype), options.beta, options.temperature
    log_q, log_p = stats.student.log_p(a, temperature), stats.teacher.log_p(b, temperature)
    weight = weight[:, None] / temperature
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
