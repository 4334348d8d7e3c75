"""A hybrid in plain JAX: a scan over pairs of layers, a gated linear recurrence and an attention with a window, in bfloat16 with float32 weights."""

import jax
import jax.numpy as jnp


def init(key, vocab, width, depth):
    def matrix(key, *shape):
        return jax.random.normal(key, shape) * shape[-2] ** -0.5

    names = {"gate": 1, "decay": 1, "in": 1, "out": 1, "q": 1, "k": 1, "v": 1, "o": 1, "g": 3, "u": 3}
    keys = iter(jax.random.split(key, 20))
    pair = {n: matrix(next(keys), depth, width, m * width) for n, m in names.items()}
    pair |= {"d": matrix(next(keys), depth, 3 * width, width), "norms": jnp.ones((depth, 3, width))}
    return {"embed": matrix(next(keys), vocab, width), "pairs": pair, "norm": jnp.ones(width)}


def rms(x, w):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * w).astype(x.dtype)


def recurrence(p, x):
    a = jax.nn.sigmoid(x @ p["decay"])
    b = (1 - a) * jax.nn.silu(x @ p["in"])
    combine = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])
    h = jax.lax.associative_scan(combine, (a, b), axis=1)[1]
    return (h * jax.nn.sigmoid(x @ p["gate"])) @ p["out"]


def attention(p, x, heads=4):
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], heads, -1) for n in "qkv")
    i = jnp.arange(x.shape[1])
    near = (i[:, None] >= i) & (i[:, None] - i < x.shape[1] // 4)
    return jax.nn.dot_product_attention(q, k, v, mask=near[None, None]).reshape(x.shape) @ p["o"]


def make(key, *, batch, length, width, depth, vocab, dtype=jnp.float32):
    params = init(key, vocab, width, depth)

    def pair(x, p):
        p = {n: w.astype(dtype) if n != "norms" else w for n, w in p.items()}
        x = x + recurrence(p, rms(x, p["norms"][0]))
        x = x + attention(p, rms(x, p["norms"][1]))
        h = rms(x, p["norms"][2])
        return x + (jax.nn.silu(h @ p["g"]) * (h @ p["u"])) @ p["d"], None

    def loss(params, tokens):
        x = params["embed"].astype(dtype)[tokens[:, :-1]]
        x, _ = jax.lax.scan(pair, x, params["pairs"])
        logits = (rms(x, params["norm"]) @ params["embed"].T.astype(dtype)).astype(jnp.float32)
        log_p = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    return loss, params, jax.random.randint(key, (batch, length + 1), 0, vocab)
