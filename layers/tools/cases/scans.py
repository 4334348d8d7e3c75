"""Rows of the benchmark: recurrences and scans."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.recurrent.checkpointed_scan import checkpointed_scan
from layers.recurrent.gated_delta_rule import gated_delta_rule
from layers.recurrent.gated_linear_attention import gated_linear_attention
from layers.recurrent.linear_recurrence import linear_recurrence
from layers.recurrent.selective_scan import selective_scan
from layers.recurrent.short_convolution import short_convolution
from layers.recurrent.state_space_dual import state_space_dual
from layers.tools.cases.case import Case, normal


def _recurrence_args() -> tuple[Any, ...]:
    a, b = (jax.random.normal(k, (4096, 2048)) for k in jax.random.split(jax.random.key(0)))
    return jax.nn.sigmoid(a), b


def _recurrence(a: Any, b: Any) -> Any:
    return lax.scan(lambda h, ab: (ab[0] * h + ab[1],) * 2, jnp.zeros_like(b[0]), (a, b))[1]


def _associative_recurrence(a: Any, b: Any) -> Any:
    return lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b))[1]


def _selective_args() -> tuple[Any, ...]:
    shapes = (2, 4096, 512), (2, 4096, 512), (512, 16), (2, 4096, 16), (2, 4096, 16)
    u, delta, a, b, c = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 5), shapes, strict=True))
    return u, jax.nn.softplus(delta - 3), -jnp.exp(a / 2), b, c


def selective(u: Any, delta: Any, a: Any, b: Any, c: Any) -> Any:
    def step(h: Any, x: Any) -> tuple[Any, Any]:
        u, delta, b, c = x
        h = jnp.exp(delta[..., None] * a) * h + (delta * u)[..., None] * b[:, None]
        return h, jnp.einsum("bds,bs->bd", h, c)

    rows = tuple(jnp.moveaxis(x, 1, 0) for x in (u, delta, b, c))
    return jnp.moveaxis(lax.scan(step, jnp.zeros((u.shape[0], *a.shape), jnp.result_type(u, a)), rows)[1], 0, 1)


def _associative_selective(u: Any, delta: Any, a: Any, b: Any, c: Any) -> Any:
    fade, drive = jnp.exp(delta[..., None] * a), (delta * u)[..., None] * b[:, :, None]
    states = lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (fade, drive), axis=1)[1]
    return jnp.einsum("btds,bts->btd", states, c)


def _attention_args() -> tuple[Any, ...]:
    q, k, v, g = (jax.random.normal(key, (1, 2048, 4, 64)) for key in jax.random.split(jax.random.key(0), 4))
    return q, k, v, jax.nn.log_sigmoid(g + 2)


def linear_attention(q: Any, k: Any, v: Any, g: Any) -> Any:
    def step(s: Any, x: Any) -> tuple[Any, Any]:
        q, k, v, g = x
        s = jnp.exp(g)[..., None] * s + k[..., None] * v[..., None, :]
        return s, jnp.einsum("bhk,bhkv->bhv", q, s) / features**0.5

    batch, _, heads, features = q.shape
    start = jnp.zeros((batch, heads, features, v.shape[3]), jnp.result_type(q, k, v, g))
    return jnp.moveaxis(lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g)))[1], 0, 1)


def _delta_args() -> tuple[Any, ...]:
    shapes = *[(1, 2048, 4, 64)] * 3, *[(1, 2048, 4)] * 2
    q, k, v, g, beta = (jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 5), shapes, strict=True))
    return q, k * lax.rsqrt((k * k).sum(-1, keepdims=True)), v, jax.nn.log_sigmoid(g + 2), jax.nn.sigmoid(beta)


def _delta_rule(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    def step(s: Any, x: Any) -> tuple[Any, Any]:
        q, k, v, g, beta = x
        s = jnp.exp(g)[..., None, None] * s
        s = s + k[..., None] * (beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, s)))[..., None, :]
        return s, jnp.einsum("bhk,bhkv->bhv", q, s) / 8

    return jnp.moveaxis(lax.scan(step, jnp.zeros((1, 4, 64, 64)), tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)))[1], 0, 1)


def _dual_args() -> tuple[Any, ...]:
    shapes = (1, 2048, 8, 64), (1, 2048, 8), (8,), (1, 2048, 1, 64), (1, 2048, 1, 64)
    x, dt, a, b, c = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 5), shapes, strict=True))
    return x, jax.nn.softplus(dt - 3), -jnp.exp(a / 2), b, c


def _dual(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
    def step(h: Any, row: Any) -> tuple[Any, Any]:
        x, dt, b, c = row
        h = jnp.exp(dt * a)[..., None, None] * h + (dt[..., None] * x)[..., None] * b[:, :, None]
        return h, (h * c[:, :, None]).sum(-1)

    return jnp.moveaxis(lax.scan(step, jnp.zeros((1, 8, 64, 64)), tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, b, c)))[1], 0, 1)


def _dual_quadratic(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
    """All pairs of a chunk of 64 steps in one product, as the paper's listing has it."""
    chunk = lambda v: v.reshape(v.shape[0], -1, 64, *v.shape[2:])
    v, g, b, c = chunk(dt[..., None] * x), jnp.moveaxis(chunk(dt * a), 3, 2), chunk(b[:, :, 0]), chunk(c[:, :, 0])
    sums = jnp.cumsum(g, -1)
    decay = jnp.exp(jnp.where(jnp.tri(64, dtype=bool), sums[..., None] - sums[..., None, :], -jnp.inf))
    out = jnp.einsum("bnik,bnjk,bnhij,bnjhp->bnihp", c, b, decay, v)
    added = jnp.einsum("bnjk,bnhj,bnjhp->bnhkp", b, jnp.exp(sums[..., -1:] - sums), v)
    step = lambda h, now: (jnp.exp(now[0])[..., None, None] * h + now[1], h)
    states = lax.scan(step, jnp.zeros_like(added[:, 0]), tuple(jnp.moveaxis(s, 1, 0) for s in (sums[..., -1], added)))[1]
    out = out + jnp.einsum("bnik,bnhi,nbhkp->bnihp", c, jnp.exp(sums), states)
    return out.reshape(x.shape)


def _convolution_args() -> tuple[Any, ...]:
    return normal((4, 2048, 1024), (4, 1, 1024), (1024,))


def _convolution(x: Any, kernel: Any, bias: Any) -> Any:
    """As Flax's depthwise `Conv` does."""
    y = lax.conv_general_dilated(x, kernel, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=x.shape[2])
    return jax.nn.silu(y + bias)


def _shifted_convolution(x: Any, kernel: Any, bias: Any) -> Any:
    window = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    return jax.nn.silu(bias + sum(window[:, i : i + x.shape[1]] * kernel[i, 0] for i in range(4)))


def _leapfrog(scan: Any, position: Any, momentum: Any, strength: Any) -> Any:
    def step(state: Any, _: None) -> tuple[Any, None]:
        q, p = state
        p = p - 0.005 * strength * jnp.sin(q)
        q = q + 0.01 * p
        return (q, p - 0.005 * strength * jnp.sin(q)), None

    return scan(step, (position, momentum), None, length=10_000)[0]


def _segments_by_hand(f: Any, init: Any, xs: None, length: int) -> Any:
    return lax.scan(jax.checkpoint(lambda c, _: lax.scan(f, c, None, length=100), prevent_cse=False), init, xs, length=length // 100)


CASES = (
    Case(
        "linear_recurrence",
        "h_t = a_t h_{t-1} + b_t, 4096 steps of 2048",
        _recurrence_args,
        _recurrence,
        linear_recurrence,
        others=(("associative scan", _associative_recurrence),),
    ),
    Case(
        "selective_scan",
        "selective scan, batch 2, 4096 steps, 512 features of 16 states",
        _selective_args,
        selective,
        selective_scan,
        others=(("associative scan", _associative_selective),),
    ),
    Case(
        "gated_linear_attention",
        "gated linear attention, 2048 tokens, 4 heads of 64",
        _attention_args,
        linear_attention,
        gated_linear_attention,
    ),
    Case(
        "gated_delta_rule",
        "gated delta rule, 2048 tokens, 4 heads of 64",
        _delta_args,
        _delta_rule,
        gated_delta_rule,
    ),
    Case(
        "state_space_dual",
        "Mamba-2's scan, 2048 tokens, 8 heads of 64, 64 states",
        _dual_args,
        _dual,
        state_space_dual,
        others=(("quadratic chunks", _dual_quadratic),),
    ),
    Case(
        "short_convolution",
        "causal depthwise convolution of 4 steps and SiLU, 4 x 2048 x 1024",
        _convolution_args,
        _convolution,
        lambda x, kernel, bias: short_convolution(x, kernel[:, 0], bias, activation="silu"),
        others=(("shifted products", _shifted_convolution),),
    ),
    Case(
        "checkpointed_scan",
        "leapfrog, 10 000 steps of 2 x (16, 32)",
        lambda: normal((16, 32), (16, 32), (16, 32)),
        partial(_leapfrog, lax.scan),
        partial(_leapfrog, checkpointed_scan),
        others=(("nested checkpoint", partial(_leapfrog, _segments_by_hand)),),
    ),
)
