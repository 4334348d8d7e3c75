"""A Llama-like decoder in plain JAX, all of it by hand as public models write it, and the same with this library's functions."""

import jax
import jax.numpy as jnp

import layers


def init(key, depth=4, width=256, vocab=8000, heads=8, kv=4, hidden=768):
    head_dim, keys = width // heads, iter(jax.random.split(key, 8 * depth + 2))

    def matrix(*shape):
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    def block():
        attention = {n: matrix(width, m, head_dim) for n, m in (("q", heads), ("k", kv), ("v", kv))} | {"o": matrix(width, width)}
        mlp = {"g": matrix(width, hidden), "u": matrix(width, hidden), "d": matrix(hidden, width)}
        return {"n1": jnp.ones(width), "n2": jnp.ones(width)} | attention | mlp

    blocks = [block() for _ in range(depth)]
    return {"embed": matrix(vocab, width), "head": matrix(width, vocab), "norm": jnp.ones(width), "blocks": blocks}


def rms(x, w, eps=1e-5):
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * w


def rope(x, pos, base=10000.0):
    angle = pos[:, None] * base ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    s, c = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    x1, x2 = jnp.split(x, 2, -1)
    return jnp.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], -1).astype(x.dtype)


def attention(b, x, pos):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, b[n]) for n in "qkv")
    q, k = rope(q, pos), rope(k, pos)
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(q.shape[-1])
    s = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), s, -1e9)
    o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), v)
    return o.reshape(*x.shape) @ b["o"]


def mlp(b, x):
    return (jax.nn.silu(x @ b["g"]) * (x @ b["u"])) @ b["d"]


def block(b, x, pos):
    x = x + attention(b, rms(x, b["n1"]), pos)
    return x + mlp(b, rms(x, b["n2"]))


def of_labels(p, x, tokens):
    log_p = jax.nn.log_softmax(rms(x, p["norm"]) @ p["head"], -1)
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()


def loss(p, tokens):
    x, pos = p["embed"][tokens[:, :-1]], jnp.arange(tokens.shape[1] - 1)
    for b in p["blocks"]:
        x = block(b, x, pos)
    return of_labels(p, x, tokens)


def scanned_loss(p, tokens, remat=False):
    x, pos = p["embed"][tokens[:, :-1]], jnp.arange(tokens.shape[1] - 1)
    step = lambda x, b: (block(b, x, pos), None)
    x, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x, jax.tree.map(lambda *a: jnp.stack(a), *p["blocks"]))
    return of_labels(p, x, tokens)


def hand_loss(p, tokens):
    """The same with this library's functions."""
    x, pos = p["embed"][tokens[:, :-1]], jnp.arange(tokens.shape[1] - 1)
    for b in p["blocks"]:
        h = layers.rms_norm(x, b["n1"], epsilon=1e-5)
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, b[n]) for n in "qkv")
        q, k = layers.rotary_embedding(q, pos), layers.rotary_embedding(k, pos)
        x = x + layers.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ b["o"]
        x = x + layers.gated_mlp(layers.rms_norm(x, b["n2"], epsilon=1e-5), b["g"], b["u"], b["d"])
    return layers.linear_cross_entropy(layers.rms_norm(x, p["norm"], epsilon=1e-5), p["head"], tokens[:, 1:])
