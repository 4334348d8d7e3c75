"""A GPT-2-like decoder in plain JAX: biases, learned positions, layer norms by hand, heads first, a softmax by hand, a mask by multiplication,
an erf GELU by hand, dropout of residuals, one-hot labels."""

import jax
import jax.numpy as jnp


def init(key, vocab, width, depth, length):
    keys = iter(jax.random.split(key, 4 * depth + 2))

    def dense(n, m):
        return {"w": 0.02 * jax.random.normal(next(keys), (n, m)), "b": jnp.zeros(m)}

    def norm():
        return {"g": jnp.ones(width), "b": jnp.zeros(width)}

    def block():
        mlp = {"up": dense(width, 4 * width), "down": dense(4 * width, width)}
        return {"ln1": norm(), "ln2": norm(), "qkv": dense(width, 3 * width), "o": dense(width, width), **mlp}

    wte = 0.02 * jax.random.normal(next(keys), (vocab, width))
    wpe = 0.01 * jax.random.normal(next(keys), (length, width))
    return {"wte": wte, "wpe": wpe, "blocks": [block() for _ in range(depth)], "ln": norm()}


def layer_norm(x, p):
    u = jnp.mean(x, axis=-1, keepdims=True)
    s = jnp.mean(jnp.square(x - u), axis=-1, keepdims=True)
    return (x - u) * jax.lax.rsqrt(s + 1e-5) * p["g"] + p["b"]


def dense(x, p):
    return x @ p["w"] + p["b"]


def gelu(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x / jnp.sqrt(2.0)))


def softmax(x):
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def heads_first(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attention(x, p, heads):
    q, k, v = (heads_first(a, heads) for a in jnp.split(dense(x, p["qkv"]), 3, axis=-1))
    w = q @ k.transpose(0, 1, 3, 2) / jnp.sqrt(v.shape[-1]).astype(v.dtype)
    b = jnp.tril(jnp.ones(w.shape[-2:], w.dtype))[None, None]
    w = w * b - 1e10 * (1 - b)
    a = (softmax(w) @ v).transpose(0, 2, 1, 3)
    return dense(a.reshape(x.shape), p["o"])


def dropout(x, key, rate):
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0) if rate else x


def block(x, p, keys, rate, heads=4):
    x = x + dropout(attention(layer_norm(x, p["ln1"]), p, heads), keys[0], rate)
    return x + dropout(dense(gelu(dense(layer_norm(x, p["ln2"]), p["up"])), p["down"]), keys[1], rate)


def make(key, *, batch, length, width, depth, vocab, rate=0.0):
    params = init(key, vocab, width, depth, length)
    keys = [list(jax.random.split(k)) for k in jax.random.split(key, depth)]

    def loss(params, tokens):
        x = params["wte"][tokens[:, :-1]] + params["wpe"]
        for p, k in zip(params["blocks"], keys, strict=True):
            x = jax.checkpoint(lambda x, p, k=k: block(x, p, k, rate))(x, p)
        logits = layer_norm(x, params["ln"]) @ params["wte"].T
        one_hot = jax.nn.one_hot(tokens[:, 1:], vocab)
        return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=-1))

    return loss, params, jax.random.randint(key, (batch, length + 1), 0, vocab)
