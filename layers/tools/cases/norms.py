"""Rows of the benchmark: norms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import layers
from layers.tools.cases.case import Case, normal


def plain_layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def plain_rms_norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def _plain_batch_norm(x: Any, scale: Any, bias: Any) -> Any:
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def _plain_group_norm(x: Any, scale: Any, bias: Any) -> Any:
    grouped = x.reshape(*x.shape[:-1], 32, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    mean = grouped.mean(axes, keepdims=True)
    variance = jnp.maximum(jnp.square(grouped).mean(axes, keepdims=True) - jnp.square(mean), 0)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape) * scale + bias


def _sum_first(norm: Any) -> Any:
    return lambda x, residual, *parameters: (norm(x + residual, *parameters), x + residual)


def _images() -> tuple[Any, ...]:
    return (*normal((8, 32, 32, 512)), jnp.ones(512), jnp.zeros(512))


CASES = (
    Case(
        "layer_norm",
        "layer norm, 8192 x 1024",
        lambda: (*normal((8192, 1024)), jnp.ones(1024), jnp.zeros(1024)),
        plain_layer_norm,
        lambda x, s, b: layers.layer_norm(x, s, b, epsilon=1e-6),
        peers=(
            ("torch", lambda torch, x, s, b: torch.nn.functional.layer_norm(x, (1024,), s, b, 1e-6)),
            ("tokamax", lambda tokamax, x, s, b: tokamax.layer_norm(x, s, b, epsilon=1e-6)),
        ),
    ),
    Case(
        "rms_norm",
        "RMS norm, 8192 x 1024",
        lambda: (*normal((8192, 1024)), jnp.ones(1024)),
        plain_rms_norm,
        lambda x, s: layers.rms_norm(x, s, epsilon=1e-6),
        peers=(("torch", lambda torch, x, s: torch.nn.functional.rms_norm(x, (1024,), s, 1e-6)),),
    ),
    Case(
        "add_layer_norm",
        "residual sum and layer norm, 8192 x 1024",
        lambda: (*normal((8192, 1024)), *normal((8192, 1024)), jnp.ones(1024), jnp.zeros(1024)),
        _sum_first(plain_layer_norm),
        lambda x, r, s, b: layers.add_layer_norm(x, r, s, b, epsilon=1e-6),
    ),
    Case(
        "add_rms_norm",
        "residual sum and RMS norm, 8192 x 1024",
        lambda: (*normal((8192, 1024)), *normal((8192, 1024)), jnp.ones(1024)),
        _sum_first(plain_rms_norm),
        lambda x, r, s: layers.add_rms_norm(x, r, s, epsilon=1e-6),
    ),
    Case("batch_norm", "batch norm, 8 x 32 x 32 x 512", _images, _plain_batch_norm, lambda x, s, b: layers.batch_norm(x, s, b, epsilon=1e-5)[0]),
    Case(
        "group_norm",
        "group norm, 8 x 32 x 32 x 512, 32 groups",
        _images,
        _plain_group_norm,
        lambda x, s, b: layers.group_norm(x, s, b, num_groups=32, epsilon=1e-6),
    ),
)
