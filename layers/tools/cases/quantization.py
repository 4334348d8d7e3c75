"""Rows of the benchmark: quantisers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from layers.quantization.fake_quantize import fake_quantize
from layers.quantization.fp8_linear import fp8_linear
from layers.quantization.int8_linear import int8_linear
from layers.quantization.vector_quantize import vector_quantize
from layers.tools.cases.case import Case, normal


def _plain_vector_quantize(x: Any, codebook: Any) -> Any:
    distances = jnp.square(x).sum(-1, keepdims=True) - 2 * x @ codebook.T + jnp.square(codebook).sum(-1)
    q = codebook[jnp.argmin(distances, -1)]
    hold = lax.stop_gradient
    return x + hold(q - x), jnp.mean((hold(x) - q) ** 2), jnp.mean((x - hold(q)) ** 2)


def _vector_quantize(gradient: str) -> Any:
    def run(x: Any, codebook: Any) -> Any:
        y, _, losses = vector_quantize(x, codebook, gradient=gradient)
        return y, losses.codebook, losses.commitment

    return run


def _plain_fake_quantize(x: Any) -> Any:
    step = lax.stop_gradient(jnp.abs(x).max(0) / 127)
    return x + lax.stop_gradient(jnp.round(jnp.clip(x / step, -128, 127)) * step - x)


def _plain_learned_step(x: Any, step: Any) -> Any:
    through = lambda u: u + lax.stop_gradient(jnp.round(u) - u)
    scale = 1 / (x.shape[0] * 127) ** 0.5
    step = step * scale + lax.stop_gradient(step - step * scale)
    return through(jnp.clip(x / step, -128, 127)) * step


CASES = (
    Case(
        "vector_quantize",
        "vector quantisation, 32768 x 64, 1024 codes",
        lambda: normal((32768, 64), (1024, 64)),
        _plain_vector_quantize,
        _vector_quantize("straight_through"),
        flops=2.0 * 32768 * 64 * 1024,
        others=(("rotation", _vector_quantize("rotation")),),
    ),
    Case(
        "int8_linear",
        "8-bit linear, 8192 x 512 -> 2048",
        lambda: normal((8192, 512), (512, 2048)),
        lambda x, w: x @ w,
        int8_linear,
        flops=6.0 * 8192 * 512 * 2048,
    ),
    Case(
        "fp8_linear",
        "8-bit floating-point linear, 8192 x 512 -> 2048",
        lambda: normal((8192, 512), (512, 2048)),
        lambda x, w: x @ w,
        fp8_linear,
        flops=6.0 * 8192 * 512 * 2048,
    ),
    Case(
        "fake_quantize",
        "8-bit fake quantisation, absolute maximum a column, 4096 x 4096",
        lambda: normal((4096, 4096)),
        _plain_fake_quantize,
        lambda x: fake_quantize(x, axis=1),
    ),
    Case(
        "fake_quantize_learned",
        "8-bit fake quantisation, a learned step a column, 4096 x 4096",
        lambda: (*normal((4096, 4096)), jnp.full(4096, 0.02)),
        _plain_learned_step,
        lambda x, step: fake_quantize(x, step, axis=1),
        peers=(("torch", lambda torch, x, s: torch._fake_quantize_learnable_per_channel_affine(x, s, torch.zeros_like(s), 1, -128, 127, 1.0)),),
    ),
)
