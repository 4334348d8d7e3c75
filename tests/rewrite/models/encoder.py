"""An encoder in Linen as flax's lm1b has it: Flax's own attention with a mask of padding, dropout everywhere, smoothed labels, weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm()(x)
        attend = nn.MultiHeadDotProductAttention(4, dropout_rate=self.rate, deterministic=not self.rate, broadcast_dropout=False)
        x = x + nn.Dropout(self.rate, deterministic=not self.rate)(attend(h, mask=mask))
        h = nn.relu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        h = nn.Dense(x.shape[-1])(nn.Dropout(self.rate, deterministic=not self.rate)(h))
        return x + nn.Dropout(self.rate, deterministic=not self.rate)(h)


class Encoder(nn.Module):
    vocab: int
    width: int
    depth: int
    rate: float

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.width)(tokens)
        mask = nn.make_attention_mask(tokens > 0, tokens > 0)
        for _ in range(self.depth):
            x = Block(self.rate)(x, mask)
        return nn.Dense(self.vocab)(nn.LayerNorm()(x))


def make(key, *, batch, length, width, depth, vocab, rate=0.0, smoothing=0.1):
    model = Encoder(vocab, width, depth, rate)
    tokens = jax.random.randint(key, (batch, length), 0, vocab).at[0, length // 2 :].set(0)
    params = model.init({"params": key, "dropout": key}, tokens)

    def loss(params, tokens):
        logits = model.apply(params, tokens, rngs={"dropout": key})
        low = smoothing / (vocab - 1)
        hot = tokens[..., None] == jnp.arange(vocab).reshape((1,) * tokens.ndim + (-1,))
        targets = jax.lax.select(hot, jnp.full(hot.shape, 1 - smoothing), jnp.full(hot.shape, low))
        nll = -jnp.sum(targets * nn.log_softmax(logits), axis=-1)
        weights = jnp.where(tokens > 0, 1, 0)
        return (nll * weights).sum() / weights.sum()

    return loss, params, tokens
