"""What the benchmark runs: for each layer the work, the idiomatic code for it, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import layers

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        name: as `python -m layers bench NAME`.
        work: what is computed, with sizes.
        args: makes the arguments; all floating-point ones are differentiated.
        idiomatic: what people write with jax.nn, Flax or optax.
        ours: the same with this library.
        flops: floating-point operations in matrix products, forward and backward, without recomputation.
        others: further ways to the same, by name.
    """

    name: str
    work: str
    args: Callable[[], tuple[Any, ...]]
    idiomatic: Fn
    ours: Fn
    flops: float = 0.0
    others: tuple[tuple[str, Fn], ...] = ()

    def programs(self) -> dict[str, Fn]:
        """Forward and backward of each way."""
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        ways: dict[str, Fn] = {
            "idiomatic": self.idiomatic,
            "checkpoint": jax.checkpoint(self.idiomatic),
            "dots policy": jax.checkpoint(self.idiomatic, policy=dots),
            **dict(self.others),
            "ours": self.ours,
        }
        return {name: _forward_and_backward(fn) for name, fn in ways.items()}


def _forward_and_backward(fn: Fn) -> Fn:
    def program(*args: Any) -> Any:
        moving = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

        def of_moving(*moved: Any) -> Any:
            now = list(args)
            for i, x in zip(moving, moved, strict=True):
                now[i] = x
            return fn(*now)

        out, pull = jax.vjp(of_moving, *[args[i] for i in moving])
        return out, pull(jax.tree.map(lambda y: jnp.ones_like(y) if y.ndim == 0 else jnp.cos(y), out))

    return program


def _normal(*shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, s) / (s[-2] ** 0.5 if i and len(s) > 1 else 1) for i, (k, s) in enumerate(zip(keys, shapes, strict=True)))


def _plain_layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def _plain_rms_norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def _attention(name: str, length: int, window: int | None = None) -> Case:
    options: dict[str, Any] = {"is_causal": True} | ({} if window is None else {"local_window_size": (window, 0)})
    heads, head_dim = 8, 64
    pairs = length * length / 2 if window is None else length * window
    return Case(
        name,
        f"causal attention, {length} tokens, {heads} heads of {head_dim}" + ("" if window is None else f", window {window}"),
        lambda: tuple(jax.random.normal(k, (1, length, heads, head_dim)) for k in jax.random.split(jax.random.key(0), 3)),
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options),
        lambda q, k, v: layers.dot_product_attention(q, k, v, **options),
        flops=12.0 * pairs * heads * head_dim,
    )


def _dropout_args() -> tuple[Any, ...]:
    return (*_normal((8192, 2048)), jax.random.key(1))


def _plain_dropout(x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


CASES: tuple[Case, ...] = (
    _attention("attention", 4096),
    _attention("attention_window", 4096, 512),
    Case(
        "layer_norm",
        "layer norm, 8192 x 1024",
        lambda: (*_normal((8192, 1024)), jnp.ones(1024), jnp.zeros(1024)),
        _plain_layer_norm,
        lambda x, s, b: layers.layer_norm(x, s, b, epsilon=1e-6),
    ),
    Case(
        "rms_norm",
        "RMS norm, 8192 x 1024",
        lambda: (*_normal((8192, 1024)), jnp.ones(1024)),
        _plain_rms_norm,
        lambda x, s: layers.rms_norm(x, s, epsilon=1e-6),
    ),
    Case("dropout", "dropout 0.1, 8192 x 2048", _dropout_args, _plain_dropout, lambda x, key: layers.dropout(x, key, rate=0.1)),
    Case(
        "embed",
        "embedding, 32768 tokens of 50000 x 512",
        lambda: (*_normal((50000, 512)), jax.random.randint(jax.random.key(1), (32768,), 0, 50000)),
        lambda table, i: table[i],
        lambda table, i: layers.embed(i, table),
    ),
    Case(
        "linear",
        "linear, 8192 x 512 -> 2048",
        lambda: (*_normal((8192, 512), (512, 2048)), jnp.zeros(2048)),
        lambda x, w, b: x @ w + b,
        lambda x, w, b: layers.linear(x, w, b),
        flops=6.0 * 8192 * 512 * 2048,
    ),
)
