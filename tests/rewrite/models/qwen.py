"""A Qwen-like decoder in Linen: norms of queries and keys, grouped heads repeated, rotary halves, weights for each token, a z-loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        variance = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).mean(-1, keepdims=True).astype(x.dtype)
        return scale * (x / jnp.sqrt(variance + 1e-6))


def rotate_half(x):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((-second, first), axis=-1)


class Attention(nn.Module):
    heads: int
    kv: int

    @nn.compact
    def __call__(self, x):
        head_dim = x.shape[-1] // self.heads
        dense = lambda n, name: nn.DenseGeneral((n, head_dim), use_bias=False, name=name)
        q, k, v = dense(self.heads, "q")(x), dense(self.kv, "k")(x), dense(self.kv, "v")(x)
        q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
        cos, sin = (f(jnp.concatenate([angle, angle], -1))[:, None] for f in (jnp.cos, jnp.sin))
        q, k = (a * cos + rotate_half(a) * sin for a in (q, k))
        k, v = (jnp.repeat(a, self.heads // self.kv, axis=2) for a in (k, v))
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        scores = jnp.matmul(q, k.swapaxes(-1, -2)) * head_dim**-0.5
        i = jnp.arange(x.shape[1])
        scores = scores + jnp.where(i[:, None] >= i, 0.0, jnp.finfo(scores.dtype).min)
        out = jnp.matmul(jax.nn.softmax(scores, axis=-1), v).transpose(0, 2, 1, 3).reshape(x.shape)
        return nn.Dense(x.shape[-1], use_bias=False, name="o")(out)


class Block(nn.Module):
    heads: int
    kv: int

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.heads, self.kv)(RMSNorm()(x))
        h, hidden = RMSNorm()(x), 3 * x.shape[-1]
        gate, up = nn.Dense(hidden, use_bias=False, name="gate")(h), nn.Dense(hidden, use_bias=False, name="up")(h)
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.silu(gate) * up)


class Qwen(nn.Module):
    vocab: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.width)(tokens)
        for _ in range(self.depth):
            x = Block(4, 2)(x)
        return nn.Dense(self.vocab, use_bias=False)(RMSNorm()(x))


def make(key, *, batch, length, width, depth, vocab):
    model = Qwen(vocab, width, depth)
    tokens = jax.random.randint(key, (batch, length + 1), 0, vocab)
    params = model.init(key, tokens[:, :-1])

    def loss(params, tokens):
        logits, labels = model.apply(params, tokens[:, :-1]), tokens[:, 1:]
        lse = jax.nn.logsumexp(logits, axis=-1)
        of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        weights = (labels != 0).astype(jnp.float32)
        return ((lse - of_label + 1e-4 * lse**2) * weights).sum() / weights.sum()

    return loss, params, tokens
