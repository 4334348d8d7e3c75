"""What cuDNN's attention is documented to compute, over the whole matrix of scores: the kernel's part of the library, run on a CPU.

Where it promises nothing there is NaN: in the output of a query that sees no key, and of one beyond its length.
"""

import jax.numpy as jnp


class FakeCudnn:
    """In place of `compat.cudnn_attention_forward` and `_backward`; lists the calls, and their batch sizes."""

    def __init__(self):
        self.calls, self.batches = [], []

    def forward(self, q, k, v, bias, lengths, *, scale, causal, window):
        self.calls.append("forward")
        self.batches.append(q.shape[0])
        given, (q, k, v, bias) = q.dtype, _wide(q, k, v, bias)
        s = _scores(q, k, bias, lengths, scale, causal, window)
        largest = s.max(-1, keepdims=True)
        p = jnp.exp(s - largest)
        total = p.sum(-1, keepdims=True)
        out = jnp.einsum("bnts,bsnh->btnh", p / total, _each_head(v, q))
        lse = (largest + jnp.log(total))[..., 0]
        if lengths is not None:
            beyond = jnp.arange(q.shape[1]) >= lengths[0][:, None]
            out, lse = jnp.where(beyond[:, :, None, None], jnp.nan, out), jnp.where(beyond[:, None], jnp.nan, lse)
        return out.astype(given), lse

    def backward(self, q, k, v, bias, lengths, lse, out, dout, *, scale, causal, window, wants_bias):
        self.calls.append("backward")
        self.batches.append(q.shape[0])
        given, (q, k, v, bias, out, dout) = q.dtype, _wide(q, k, v, bias, out, dout)
        s = _scores(q, k, bias, lengths, scale, causal, window)
        p = jnp.exp(s - lse[..., None])
        dp = jnp.einsum("btnh,bsnh->bnts", dout, _each_head(v, q))
        ds = p * (dp - jnp.moveaxis((dout * out).sum(-1), 1, 2)[..., None])
        dq = scale * jnp.einsum("bnts,bsnh->btnh", ds, _each_head(k, q))
        dk = scale * jnp.einsum("bnts,btnh->bsnh", ds, q)
        dv = jnp.einsum("bnts,btnh->bsnh", p, dout)
        grads = [dq, *(x.reshape(*k.shape[:3], -1, x.shape[-1]).sum(3) for x in (dk, dv))]
        grads += [ds.sum(0, keepdims=True)] if wants_bias else []
        return [g.astype(given) for g in grads]


def _wide(*arrays):
    return [None if x is None else x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]


def _each_head(x, q):
    return jnp.repeat(x, q.shape[2] // x.shape[2], 2)


def _scores(q, k, bias, lengths, scale, causal, window):
    s = scale * jnp.einsum("btnh,bsnh->bnts", q, _each_head(k, q))
    s = s if bias is None else s + bias
    steps = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    seen = jnp.ones(steps.shape, bool)
    if causal:
        seen &= steps >= 0
    if window is not None:
        seen &= steps < window
    if lengths is not None:
        seen = seen & (jnp.arange(k.shape[1]) < lengths[1][:, None, None, None])
    return jnp.where(seen, s, -jnp.inf)
