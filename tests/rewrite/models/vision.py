"""A ViT in nnx with Flax's own attention, and a Mixer in Equinox: classifiers with smoothed labels."""

import equinox as eqx
import jax
import optax
from flax import nnx


class Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(width, 4 * width, rngs=rngs), nnx.gelu, nnx.Linear(4 * width, width, rngs=rngs))

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ViT(nnx.Module):
    def __init__(self, length, width, depth, classes, rngs):
        self.patches = nnx.Linear(48, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List([Block(width, 4, rngs) for _ in range(depth)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def smoothed(logits, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def make_vit(key, *, batch, length, width, depth, vocab):
    graph, params = nnx.split(ViT(length, width, depth, vocab, nnx.Rngs(key)))
    loss = lambda params, batch: smoothed(nnx.merge(graph, params)(batch[0]), batch[1])
    return loss, params, (jax.random.normal(key, (batch, length, 48)), jax.random.randint(key, (batch,), 0, vocab))


class MixerBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    tokens: eqx.nn.MLP
    channels: eqx.nn.MLP

    def __init__(self, length, width, key):
        keys = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        exact = lambda x: jax.nn.gelu(x, approximate=False)
        self.tokens = eqx.nn.MLP(length, length, 2 * length, 1, exact, key=keys[0])
        self.channels = eqx.nn.MLP(width, width, 4 * width, 1, exact, key=keys[1])

    def __call__(self, x):
        x = x + jax.vmap(self.tokens, 1, 1)(jax.vmap(self.norm1)(x))
        return x + jax.vmap(self.channels)(jax.vmap(self.norm2)(x))


class Mixer(eqx.Module):
    patches: eqx.nn.Linear
    blocks: list[MixerBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, length, width, depth, classes, key):
        keys = jax.random.split(key, depth + 2)
        self.patches, self.head = eqx.nn.Linear(48, width, key=keys[0]), eqx.nn.Linear(width, classes, key=keys[1])
        self.blocks, self.norm = [MixerBlock(length, width, k) for k in keys[2:]], eqx.nn.LayerNorm(width)

    def __call__(self, x):
        x = jax.vmap(self.patches)(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jax.vmap(self.norm)(x).mean(0))


def make_mixer(key, *, batch, length, width, depth, vocab):
    params, static = eqx.partition(Mixer(length, width, depth, vocab, key), eqx.is_inexact_array)

    def loss(params, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch[0])
        return smoothed(logits, batch[1])

    return loss, params, (jax.random.normal(key, (batch, length, 48)), jax.random.randint(key, (batch,), 0, vocab))
