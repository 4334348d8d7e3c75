"""A Whisper-like encoder and decoder in Equinox: cross attention, no bias of keys, exact GELU, padded labels."""

import equinox as eqx
import jax
import jax.numpy as jnp


class Attention(eqx.Module):
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    heads: int

    def __init__(self, width, heads, key):
        keys = jax.random.split(key, 4)
        self.q, self.v, self.o = (eqx.nn.Linear(width, width, key=k) for k in keys[:3])
        self.k, self.heads = eqx.nn.Linear(width, width, use_bias=False, key=keys[3]), heads

    def __call__(self, x, y, mask=None):
        split = lambda f, a: jax.vmap(f)(a).reshape(a.shape[0], self.heads, -1)
        q, k, v = split(self.q, x), split(self.k, y), split(self.v, y)
        scale = (q.shape[-1]) ** -0.25
        logits = jnp.einsum("thd,shd->hts", q * scale, k * scale)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        out = jnp.einsum("hts,shd->thd", jax.nn.softmax(logits), v)
        return jax.vmap(self.o)(out.reshape(x.shape))


class Block(eqx.Module):
    attention: Attention
    cross: Attention | None
    norms: list[eqx.nn.LayerNorm]
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width, cross, key):
        keys = jax.random.split(key, 4)
        self.attention, self.cross = Attention(width, 4, keys[0]), Attention(width, 4, keys[1]) if cross else None
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(3)]
        self.up, self.down = eqx.nn.Linear(width, 4 * width, key=keys[2]), eqx.nn.Linear(4 * width, width, key=keys[3])

    def __call__(self, x, audio=None, mask=None):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, mask)
        if self.cross is not None:
            x = x + self.cross(jax.vmap(self.norms[1])(x), audio)
        h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[2])(x)), approximate=False)
        return x + jax.vmap(self.down)(h)


class Whisper(eqx.Module):
    encoder: list[Block]
    decoder: list[Block]
    table: jax.Array
    norm: eqx.nn.LayerNorm

    def __init__(self, vocab, width, depth, key):
        keys = jax.random.split(key, 2 * depth + 1)
        self.encoder = [Block(width, False, k) for k in keys[:depth]]
        self.decoder = [Block(width, True, k) for k in keys[depth:-1]]
        self.table, self.norm = 0.1 * jax.random.normal(keys[-1], (vocab, width)), eqx.nn.LayerNorm(width)

    def __call__(self, audio, tokens):
        for block in self.encoder:
            audio = block(audio)
        x, mask = self.table[tokens], jnp.tril(jnp.ones((tokens.shape[0],) * 2, bool))
        for block in self.decoder:
            x = block(x, audio, mask)
        return jax.vmap(self.norm)(x) @ self.table.T


def make(key, *, batch, length, width, depth, vocab):
    params, static = eqx.partition(Whisper(vocab, width, depth, key), eqx.is_inexact_array)

    def loss(params, batch):
        audio, tokens = batch
        log_p = jax.nn.log_softmax(jax.vmap(eqx.combine(params, static))(audio, tokens[:, :-1]))
        labels = tokens[:, 1:]
        nll = -jnp.take_along_axis(log_p, jnp.where(labels < 0, 0, labels)[..., None], axis=-1)[..., 0]
        return jnp.where(labels < 0, 0, nll).sum() / (labels >= 0).sum()

    tokens = jax.random.randint(key, (batch, length + 1), 0, vocab).at[0, length // 2 :].set(-1)
    return loss, params, (jax.random.normal(key, (batch, 2 * length, width)), tokens)
