"""A whole bfloat16 training step of a Llama-like model, of the size of one that people train on one GPU, as they write it and of these layers.

4 layers, width 2048, 16 query and 8 key heads of 128, a SwiGLU MLP of 5632, a vocabulary of 128 256, 4 x 4096 tokens, float32 parameters, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import layers

SIZES: dict[str, int] = {
    "vocab": 128256,
    "width": 2048,
    "depth": 4,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "hidden": 5632,
    "batch": 4,
    "time": 4096,
}
WAYS = ("idiomatic", "ours")


def _rotate(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """Attention with rotary embedding and a gated MLP, each behind a norm."""

    def __init__(self, way: str, sizes: dict[str, int], rngs: nnx.Rngs, implementation: str | None = None):
        made: Any = nnx if way == "idiomatic" else layers
        width, heads, kv_heads, self.head_dim = sizes["width"], sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.norm_1, self.norm_2 = (made.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs) for _ in range(2))

        def linear(inputs: int, outputs: int) -> Any:
            return made.Linear(inputs, outputs, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)

        self.query, self.key, self.value = (linear(width, n * self.head_dim) for n in (heads, kv_heads, kv_heads))
        self.out = linear(heads * self.head_dim, width)
        if way == "idiomatic":
            self.gate, self.up, self.down = linear(width, sizes["hidden"]), linear(width, sizes["hidden"]), linear(sizes["hidden"], width)
        else:
            self.mlp = layers.GatedMLP(width, sizes["hidden"], dtype=jnp.bfloat16, rngs=rngs)
        self.plain, self.implementation = way == "idiomatic", implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm_1(x)
        q, k, v = (f(h).reshape(*h.shape[:2], -1, self.head_dim) for f in (self.query, self.key, self.value))
        attend: Any = jax.nn.dot_product_attention if self.plain else layers.dot_product_attention
        x = x + self.out(attend(_rotate(q), _rotate(k), v, is_causal=True, implementation=self.implementation).reshape(*x.shape[:2], -1))
        h = self.norm_2(x)
        return x + (self.down(nnx.silu(self.gate(h)) * self.up(h)) if self.plain else self.mlp(h))


class Decoder(nnx.Module):
    """The model, with its loss."""

    def __init__(self, way: str, sizes: dict[str, int], rngs: nnx.Rngs, implementation: str | None = None):
        made: Any = nnx if way == "idiomatic" else layers
        self.embed = made.Embed(sizes["vocab"], sizes["width"], dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([Block(way, sizes, rngs, implementation) for _ in range(sizes["depth"])])
        self.norm = made.RMSNorm(sizes["width"], dtype=jnp.bfloat16, rngs=rngs)
        self.head = made.Linear(sizes["width"], sizes["vocab"], use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        self.plain = way == "idiomatic"

    def loss(self, tokens: jax.Array) -> jax.Array:
        """The mean cross entropy of each next token."""
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        x, labels = self.norm(x), tokens[:, 1:]
        if self.plain:
            return optax.softmax_cross_entropy_with_integer_labels(self.head(x).astype(jnp.float32), labels).mean()
        return layers.linear_cross_entropy(x, self.head.kernel[...].astype(jnp.bfloat16), labels)


def make_step(way: str, sizes: dict[str, int] | None = None, implementation: str | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step `(params, moments, tokens) -> (params, moments, loss)`, and the shapes of its arguments.

    Args:
        way: one of `WAYS`.
        sizes: other sizes than `SIZES`.
        implementation: of attention; None for what it takes by itself.
    """
    sizes = sizes or SIZES
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: Decoder(way, sizes, nnx.Rngs(0), implementation)), nnx.Param, ...)
    optimizer = optax.adamw(1e-4)

    def step(params: Any, moments: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda p: nnx.merge(graph, p, rest).loss(tokens))(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return step, (params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((sizes["batch"], sizes["time"] + 1), jnp.int32))
