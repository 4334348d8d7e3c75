"""A Gemma-like decoder in nnx: soft caps, 1 + scale, a tied table, grouped heads, windows in every other layer, an optax loss."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import layers


class RMSNorm(nnx.Module):
    def __init__(self, width):
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        var = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(var + 1e-6) * (1 + self.scale[...])


def rotate(x, positions):
    fraction = 2 * jnp.arange(x.shape[-1] // 2) / x.shape[-1]
    angle = positions[..., None] / 10_000**fraction
    sin, cos = jnp.sin(angle)[..., None, :], jnp.cos(angle)[..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, width, heads, kv, window, rngs):
        head_dim = width // heads
        init = nnx.initializers.normal(width**-0.5)
        self.q = nnx.Param(init(rngs.params(), (heads, width, head_dim)))
        self.kv = nnx.Param(init(rngs.params(), (2, kv, width, head_dim)))
        self.out = nnx.Param(init(rngs.params(), (heads, head_dim, width)))
        self.window = window

    def __call__(self, x, positions, mask):
        q = jnp.einsum("BTD,NDH->BTNH", x, self.q[...])
        k, v = jnp.einsum("BSD,CKDH->CBSKH", x, self.kv[...])
        q, k = rotate(q, positions) * q.shape[-1] ** -0.5, rotate(k, positions)
        b, t, n, h = q.shape
        q = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k).reshape(b, t, n, -1)
        logits = jnp.tanh(logits / 50.0) * 50.0
        if self.window:
            near = jnp.triu(jnp.ones_like(mask), 1 - self.window) * jnp.tril(jnp.ones_like(mask), self.window - 1)
            mask = near * mask
        padded = jnp.where(jnp.expand_dims(mask, -2), logits, -2.3819763e38)
        probs = jax.nn.softmax(padded, axis=-1).astype(k.dtype)
        probs = probs.reshape(b, t, k.shape[2], n // k.shape[2], -1)
        encoded = jnp.einsum("BTKGS,BSKH->BTKGH", probs, v).reshape(b, t, n, h)
        return jnp.einsum("BTNH,NHD->BTD", encoded, self.out[...])


class FeedForward(nnx.Module):
    def __init__(self, width, hidden, rngs):
        self.gate, self.up = (nnx.Linear(width, hidden, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, width, heads, kv, hidden, window, rngs):
        self.norms = nnx.List([RMSNorm(width) for _ in range(4)])
        self.attention = Attention(width, heads, kv, window, rngs)
        self.mlp = FeedForward(width, hidden, rngs)

    def __call__(self, x, positions, mask):
        x = x + self.norms[1](self.attention(self.norms[0](x), positions, mask))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class Gemma(nnx.Module):
    def __init__(self, vocab, width, depth, heads, kv, hidden, window, rngs):
        self.table = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (vocab, width)))
        self.blocks = nnx.List([Block(width, heads, kv, hidden, window * (i % 2 == 0), rngs) for i in range(depth)])
        self.norm = RMSNorm(width)

    def __call__(self, tokens):
        table = self.table[...]
        x = table[tokens] * jnp.sqrt(table.shape[1]).astype(table.dtype)
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (tokens.shape[0], length, length))
        for block in self.blocks:
            x = block(x, positions, mask)
        logits = jnp.dot(self.norm(x), table.T)
        return jnp.tanh(logits / 30.0) * 30.0


def make(key, *, batch, length, width, depth, vocab, is_port=False):
    graph, params = nnx.split(Gemma(vocab, width, depth, 4, 2, 3 * width, length // 4, nnx.Rngs(key)))

    def loss(params, tokens):
        if is_port:
            return by_hand(nnx.merge(graph, params), tokens)
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss, params, jax.random.randint(key, (batch, length + 1), 0, vocab)


def by_hand(model, tokens):
    """The loss with this library's functions."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    table, positions = model.table[...], jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    norm = lambda norm, x: layers.rms_norm(x, 1 + norm.scale[...], epsilon=1e-6)

    def attention(part, x):
        q = jnp.einsum("BTD,NDH->BTNH", x, part.q[...])
        k, v = jnp.einsum("BSD,CKDH->CBSKH", x, part.kv[...])
        q, k = (layers.rotary_embedding(a, positions) for a in (q, k))
        window = (part.window - 1, 0) if part.window else None
        y = layers.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, logit_soft_cap=50.0)
        return jnp.einsum("BTNH,NHD->BTD", y, part.out[...])

    def mlp(part, x):
        gate, up, down = (linear.kernel[...] for linear in (part.gate, part.up, part.down))
        return layers.gated_mlp(x, gate, up, down, activation="gelu")

    x = table[inputs] * jnp.sqrt(table.shape[1]).astype(table.dtype)
    for block in model.blocks:
        x = x + norm(block.norms[1], attention(block.attention, norm(block.norms[0], x)))
        x = x + norm(block.norms[3], mlp(block.mlp, norm(block.norms[2], x)))
    return layers.linear_cross_entropy(norm(model.norm, x), table.T, labels, logit_soft_cap=30.0)
