"""Rows of the benchmark: losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.linear_grpo import linear_grpo
from layers.losses.linear_jsd import linear_jsd
from layers.losses.linear_log_prob import linear_log_prob
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from layers.tools.cases.case import Case, normal


def _linear(name: str, rows: int, features: int, vocab: int, **options: Any) -> Case:
    return Case(
        name,
        f"linear + cross entropy, {rows} x {features} -> {vocab}",
        lambda: (*normal((rows, features), (features, vocab)), _labels(rows, vocab)),
        lambda x, w, y: optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean(),
        lambda x, w, y: linear_cross_entropy(x, w, y),
        flops=6.0 * rows * features * vocab,
        peers=(
            ("torch", lambda torch, x, w, y: torch.nn.functional.cross_entropy(x @ w, y.long())),
            ("tokamax", lambda tokamax, x, w, y: tokamax.linear_softmax_cross_entropy_loss(x, y, w, reduction="mean")),
        ),
        **options,
    )


def _labels(rows: int, vocab: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (rows,), 0, vocab)


def _plain_smoothed(logits: jax.Array, labels: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy(wide, optax.smooth_labels(jax.nn.one_hot(labels, wide.shape[-1]), 0.1)).mean()


def _plain_jsd(x: Any, kernel: Any, teacher_x: Any, teacher_kernel: Any) -> Any:
    log_q = jax.nn.log_softmax(x @ kernel)
    log_p = jax.nn.log_softmax(lax.stop_gradient(teacher_x @ teacher_kernel))
    log_m = jnp.logaddexp(log_q, log_p) - jnp.log(2.0)
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1).mean()


def _plain_log_prob(x: Any, kernel: Any, ids: Any) -> Any:
    return jnp.take_along_axis(jax.nn.log_softmax(x @ kernel), ids[..., None], -1)[..., 0]


def _plain_grpo(x: Any, kernel: Any, ids: Any, advantages: Any, old: Any) -> Any:
    ratio, a = jnp.exp(_plain_log_prob(x, kernel, ids) - old), advantages[:, None]
    return -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a).mean()


def _sampled(sequences: int, time: int, features: int, vocab: int) -> tuple[jax.Array, ...]:
    x, kernel = normal((sequences, time, features), (features, vocab))
    advantages, old = normal((sequences,), (sequences, time))
    return x, kernel / features, _labels(sequences * time, vocab).reshape(sequences, time), advantages, 0.1 * old - jnp.log(float(vocab))


CASES = (
    _linear("linear_cross_entropy", 4096, 512, 32000),
    _linear("linear_cross_entropy_128k", 2048, 1024, 128000, rounds=3),
    Case(
        "softmax_cross_entropy",
        "cross entropy of logits, 4096 x 32000",
        lambda: (*normal((4096, 32000)), _labels(4096, 32000)),
        lambda a, y: optax.softmax_cross_entropy_with_integer_labels(a, y).mean(),
        lambda a, y: softmax_cross_entropy(a, y),
        peers=(("torch", lambda torch, a, y: torch.nn.functional.cross_entropy(a, y.long())),),
    ),
    Case(
        "softmax_cross_entropy_smoothed",
        "cross entropy of bfloat16 logits with label smoothing, 4096 x 32000",
        lambda: (normal((4096, 32000))[0].astype(jnp.bfloat16), _labels(4096, 32000)),
        _plain_smoothed,
        lambda a, y: softmax_cross_entropy(a, y, label_smoothing=0.1),
        peers=(("torch", lambda torch, a, y: torch.nn.functional.cross_entropy(a, y.long(), label_smoothing=0.1).float()),),
    ),
    Case(
        "linear_jsd",
        "distillation by Jensen-Shannon divergence, 2048 x 512 and 1024 -> 32000",
        lambda: (*normal((2048, 512), (512, 32000)), *normal((2048, 1024), (1024, 32000))),
        _plain_jsd,
        lambda x, w, tx, tw: linear_jsd(x, w, tx, tw),
        flops=2.0 * 2048 * 32000 * (3 * 512 + 1024),
        rounds=5,
    ),
    Case(
        "linear_log_prob",
        "log-probabilities of tokens under a head, 2048 x 512 -> 32000",
        lambda: (*normal((2048, 512), (512, 32000)), _labels(2048, 32000)),
        lambda x, w, y: _plain_log_prob(x, w, y).sum(),
        lambda x, w, y: linear_log_prob(x, w, y).sum(),
        flops=6.0 * 2048 * 512 * 32000,
        rounds=5,
    ),
    Case(
        "linear_grpo",
        "clipped policy loss (GRPO) of 8 completions of 256 tokens, 512 -> 32000",
        lambda: _sampled(8, 256, 512, 32000),
        _plain_grpo,
        lambda x, w, ids, a, old: linear_grpo(x, w, ids, a, old_log_probs=old),
        flops=6.0 * 2048 * 512 * 32000,
        rounds=5,
    ),
)
