"""A decoder-only language model, written once for the layers of this library and for Flax's own, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import optax
from flax import nnx

import layers

Experts = Callable[[int, nnx.Rngs], nnx.Module]
MODULES: dict[str, ModuleType] = {"ours": layers, "flax": nnx}


class PlainMLP(nnx.Module):
    """What people write with Flax for `layers.MLP`."""

    def __init__(self, in_features: int, hidden_features: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(in_features, hidden_features, rngs=rngs)
        self.down = nnx.Linear(hidden_features, in_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """Pre-norm attention and MLP, or `experts(width, rngs)` in its place."""

    def __init__(self, modules: ModuleType, width: int, heads: int, rngs: nnx.Rngs, experts: Experts | None = None):
        self.norm_1 = modules.RMSNorm(width, rngs=rngs)
        self.attention = modules.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm_2 = modules.RMSNorm(width, rngs=rngs)
        mlp = layers.MLP if modules is layers else PlainMLP
        self.mlp: Any = mlp(width, 4 * width, rngs=rngs) if experts is None else experts(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x), is_causal=True)
        if isinstance(self.mlp, layers.MLP):
            return x + self.mlp(x, self.norm_2.scale[...], self.norm_2.epsilon)
        return x + self.mlp(self.norm_2(x))


class Decoder(nnx.Module):
    """A causal model of tokens.

    Args:
        modules: `layers` or `flax.nnx`: whose layers it is made of.
        vocab, length, width, depth, heads: its sizes.
        scan: holds the blocks as one with a leading axis, and goes over them in a loop.
        experts: makes what stands in place of the perceptron of a block.
    """

    def __init__(
        self,
        modules: ModuleType,
        rngs: nnx.Rngs,
        *,
        vocab: int,
        length: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        scan: bool = False,
        experts: Experts | None = None,
    ):
        def block(rngs: nnx.Rngs) -> Block:
            return Block(modules, width, heads, rngs, experts)

        self.embed = modules.Embed(vocab, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.scanned = scan
        self.blocks: Any = nnx.vmap(block)(rngs.split(depth)) if scan else nnx.List([block(rngs) for _ in range(depth)])
        self.norm = modules.RMSNorm(width, rngs=rngs)
        self.head = modules.Linear(width, vocab, use_bias=False, rngs=rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """The features that the head makes logits of."""
        x = self.embed(tokens) + self.position[...][: tokens.shape[1]]
        if self.scanned:
            graph, state = nnx.split(self.blocks)
            x = jax.lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, state)[0]
        else:
            for block in self.blocks:
                x = block(x)
        return self.norm(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.hidden(tokens))


def plain_loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy of each next token, by optax."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def fused_loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The same, without the logits ever being whole in memory."""
    return layers.linear_cross_entropy(model.hidden(tokens[:, :-1]), model.head.kernel[...], tokens[:, 1:])


LOSSES: dict[str, Callable[[Decoder, jax.Array], jax.Array]] = {"ours": fused_loss, "flax": plain_loss}
