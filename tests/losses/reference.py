"""The losses written plainly, on whole logits, for JAX to differentiate."""

from functools import partial

import jax
import jax.numpy as jnp

jit_quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiled in less time, to code that takes longer: most of what these tests take is compilation."""


def cross_entropy(
    logits,
    labels,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_soft_cap=None,
    class_weights=None,
    reduction="mean",
    return_logsumexp=False,
    return_accuracy=False,
    block_size=None,
):
    vocab, s = logits.shape[-1], label_smoothing
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    w = jnp.ones(vocab, logits.dtype) if class_weights is None else jnp.asarray(class_weights, logits.dtype)
    lse, log_p = jax.nn.logsumexp(logits, -1), jax.nn.log_softmax(logits)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        counted = labels != ignore_index
        classes = jnp.where(counted, labels, 0)
        target = (1 - s) * w[classes][..., None] * jax.nn.one_hot(classes, vocab, dtype=logits.dtype) + s / vocab * w
        weight, denominator = jnp.where(counted, w[classes], 0), jnp.where(counted, w[classes], 0).sum()
    else:
        counted, classes = jnp.ones(labels.shape[:-1], bool), labels.argmax(-1)
        target = w * ((1 - s) * labels + s / vocab)
        weight, denominator = jnp.ones(labels.shape[:-1]), counted.size
    loss = jnp.where(counted, -(target * log_p).sum(-1), 0) + z_loss * weight * lse**2
    hits = (counted * (logits.argmax(-1) == classes)).astype(logits.dtype)
    if reduction == "mean":
        loss, hits = loss.sum() / denominator, hits.sum() / counted.sum()
    elif reduction == "sum":
        loss, hits = loss.sum(), hits.sum() / counted.sum()
    found = (loss, *((lse,) if return_logsumexp else ()), *((hits,) if return_accuracy else ()))
    return found[0] if len(found) == 1 else found


def jensen_shannon(student, teacher, *, beta, temperature=1.0):
    """Of each row of logits; KL(teacher || student) for beta 0, KL(student || teacher) for 1."""
    log_q, log_p = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1)
    log_m = jnp.log(beta * p + (1 - beta) * q)
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def dpo(chosen, rejected, reference_chosen, reference_rejected, *, beta, label_smoothing=0.0):
    """Of pairs of log-probabilities of whole sequences, (pairs,) each."""
    margin = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
