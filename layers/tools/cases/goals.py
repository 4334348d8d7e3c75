"""Rows of the benchmark of the size that people train on one GPU, in bfloat16, each with the goal that it is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import layers
from layers.tools.cases.case import Case, normal
from layers.tools.cases.mlp import plain_gated
from layers.tools.cases.norms import plain_layer_norm, plain_rms_norm
from layers.tools.cases.scans import linear_attention, selective


@dataclass(frozen=True)
class Sizes:
    """Lengths of the axes of all rows.

    Attributes:
        batch, time, heads, kv_heads, head_dim: of attention and of the recurrences.
        rows, width, hidden, vocab: of a model's products; `rows` is the number of its tokens.
        wide: features of the norms and of the 8-bit products.
        wide_hidden: outputs of the 8-bit products.
        loss_rows: rows of logits.
        groups, group_hidden: of the grouped product.
    """

    batch: int = 4
    time: int = 4096
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    rows: int = 16384
    width: int = 2048
    hidden: int = 5632
    vocab: int = 128256
    wide: int = 4096
    wide_hidden: int = 14336
    loss_rows: int = 8192
    groups: int = 64
    group_hidden: int = 1408


FULL = Sizes()


@dataclass(frozen=True)
class Goal:
    """What a row is to reach on an H100 or H200.

    Attributes:
        milliseconds: forward and backward in one program.
        gigabytes: of temporary memory, 10^9 bytes; None where time alone is the goal.
    """

    milliseconds: float
    gigabytes: float | None = None


GOALS: dict[str, Goal] = {
    "gpu_attention": Goal(2.55),
    "gpu_attention_bias": Goal(5.8),
    "gpu_attention_soft_cap": Goal(3.4),
    "gpu_attention_segments": Goal(3.2),
    "gpu_linear_cross_entropy": Goal(43, 1.2),
    "gpu_softmax_cross_entropy": Goal(2.1),
    "gpu_rms_norm": Goal(0.35),
    "gpu_layer_norm": Goal(0.5),
    "gpu_gated_mlp": Goal(5.4, 0.75),
    "gpu_fp8_linear": Goal(5.0),
    "gpu_int8_linear": Goal(8.3),
    "gpu_grouped_matmul": Goal(3.0),
    "gpu_gated_linear_attention": Goal(2.5),
    "gpu_selective_scan": Goal(2.5),
    "training_step_gpu": Goal(85, 5.8),
}


def cases(n: Sizes = FULL) -> tuple[Case, ...]:
    """The rows, of these sizes."""
    return (*_attention(n), *_losses(n), *_norms_and_products(n), *_recurrences(n))


def _attention(n: Sizes) -> tuple[Case, ...]:
    size = f"{n.batch} x {n.time}, {n.heads} and {n.kv_heads} heads of {n.head_dim}"
    q, kv = (n.batch, n.time, n.heads, n.head_dim), (n.batch, n.time, n.kv_heads, n.head_dim)
    flops = 6.0 * n.batch * n.time**2 * n.heads * n.head_dim
    plain, ours = jax.nn.dot_product_attention, layers.dot_product_attention

    def capped(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.astype(jnp.float32) for x in (q, *(jnp.repeat(x, n.heads // n.kv_heads, 2) for x in (k, v))))
        scores = 50 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) / n.head_dim**0.5 / 50)
        weights = jax.nn.softmax(jnp.where(jnp.tri(n.time, dtype=bool), scores, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def packed() -> Any:
        return jnp.arange(n.batch * n.time).reshape(n.batch, n.time) % n.time // (n.time // 4)

    def masked(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return plain(q, k, v, mask=ids[:, None, :, None] == ids[:, None, None, :], is_causal=True)

    return (
        Case(
            "gpu_attention",
            f"causal attention, {size}",
            lambda: normal(q, kv, kv),
            lambda q, k, v: plain(q, k, v, is_causal=True),
            lambda q, k, v: ours(q, k, v, is_causal=True),
            flops=flops,
        ),
        Case(
            "gpu_attention_bias",
            f"causal attention with a learned bias, {size}",
            lambda: normal(q, kv, kv, (1, n.heads, n.time, n.time)),
            lambda q, k, v, bias: plain(q, k, v, bias, is_causal=True),
            lambda q, k, v, bias: ours(q, k, v, bias, is_causal=True),
            flops=flops,
        ),
        Case(
            "gpu_attention_soft_cap",
            f"causal attention with a soft cap, {size}",
            lambda: normal(q, kv, kv),
            capped,
            lambda q, k, v: ours(q, k, v, is_causal=True, logit_soft_cap=50.0),
            flops=flops,
        ),
        Case(
            "gpu_attention_segments",
            f"causal attention of 4 packed sequences, {size}",
            lambda: (*normal(q, kv, kv), packed()),
            masked,
            lambda q, k, v, ids: ours(q, k, v, segment_ids=ids, is_causal=True),
            flops=flops / 4,
        ),
    )


def _labels(rows: int, vocab: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (rows,), 0, vocab)


def _losses(n: Sizes) -> tuple[Case, ...]:
    def plain(logits: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

    return (
        Case(
            "gpu_linear_cross_entropy",
            f"linear + cross entropy, {n.rows} x {n.width} -> {n.vocab}",
            lambda: (*normal((n.rows, n.width), (n.width, n.vocab)), _labels(n.rows, n.vocab)),
            lambda x, w, y: plain(x @ w, y),
            lambda x, w, y: layers.linear_cross_entropy(x, w, y),
            flops=6.0 * n.rows * n.width * n.vocab,
        ),
        Case(
            "gpu_softmax_cross_entropy",
            f"cross entropy of logits, {n.loss_rows} x {n.vocab}",
            lambda: (*normal((n.loss_rows, n.vocab)), _labels(n.loss_rows, n.vocab)),
            plain,
            lambda a, y: layers.softmax_cross_entropy(a, y),
        ),
    )


def _norms_and_products(n: Sizes) -> tuple[Case, ...]:
    norm = f"{n.rows} x {n.wide}"
    product = f"{n.rows} x {n.wide} -> {n.wide_hidden}"
    sizes = n.rows // n.groups
    narrow = lambda: normal((n.rows, n.wide), (n.wide, n.wide_hidden))
    flops = 6.0 * n.rows * n.wide * n.wide_hidden
    return (
        Case(
            "gpu_rms_norm",
            f"RMS norm, {norm}",
            lambda: (*normal((n.rows, n.wide)), jnp.ones(n.wide)),
            plain_rms_norm,
            lambda x, s: layers.rms_norm(x, s, epsilon=1e-6),
        ),
        Case(
            "gpu_layer_norm",
            f"layer norm, {norm}",
            lambda: (*normal((n.rows, n.wide)), jnp.ones(n.wide), jnp.zeros(n.wide)),
            plain_layer_norm,
            lambda x, s, b: layers.layer_norm(x, s, b, epsilon=1e-6),
        ),
        Case(
            "gpu_gated_mlp",
            f"SwiGLU MLP, {n.rows} x {n.width} -> {n.hidden}",
            lambda: normal((n.rows, n.width), *[(n.width, n.hidden)] * 2, (n.hidden, n.width)),
            plain_gated,
            layers.gated_mlp,
            flops=18.0 * n.rows * n.width * n.hidden,
        ),
        Case("gpu_fp8_linear", f"8-bit floating-point linear, {product}", narrow, lambda x, w: x @ w, layers.fp8_linear, flops=flops),
        Case("gpu_int8_linear", f"8-bit linear, {product}", narrow, lambda x, w: x @ w, layers.int8_linear, flops=flops),
        Case(
            "gpu_grouped_matmul",
            f"grouped product, {n.rows} x {n.width} -> {n.group_hidden}, {n.groups} groups",
            lambda: (*normal((n.rows, n.width), (n.groups, n.width, n.group_hidden)), jnp.full(n.groups, sizes)),
            lax.ragged_dot,
            layers.grouped_matmul,
            flops=6.0 * n.rows * n.width * n.group_hidden,
        ),
    )


def _recurrences(n: Sizes) -> tuple[Case, ...]:
    heads, rows = (n.batch, n.time, n.heads, n.head_dim), (n.batch, n.time, n.width)
    states = (n.batch, n.time, 16)

    def linear_attention_args() -> tuple[Any, ...]:
        q, k, v, g = normal(*[heads] * 4)
        return q / heads[-1] ** 0.5, k, v, jax.nn.log_sigmoid(g + 2)

    def selective_args() -> tuple[Any, ...]:
        u, delta, a, b, c = normal(rows, rows, (n.width, 16), states, states)
        return u, jax.nn.softplus(delta - 3), -jnp.exp(a / 2), b, c

    return (
        Case(
            "gpu_gated_linear_attention",
            f"gated linear attention, {n.batch} x {n.time}, {n.heads} heads of {n.head_dim}",
            linear_attention_args,
            linear_attention,
            layers.gated_linear_attention,
        ),
        Case(
            "gpu_selective_scan",
            f"selective scan, {n.batch} x {n.time}, {n.width} features of 16 states",
            selective_args,
            selective,
            layers.selective_scan,
        ),
    )


CASES = cases()
