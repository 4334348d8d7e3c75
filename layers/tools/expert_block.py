"""Experts in a language model, and what people write for them without grouped products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jax import lax

BALANCE, Z = 1e-2, 1e-3
"""How much the two losses of a router count."""


class PlainRouting(NamedTuple):
    """The losses of a router."""

    balance_loss: jax.Array
    z_loss: jax.Array


class PlainGatedMoE(nnx.Module):
    """Every expert for every token, with the parameters of `layers.GatedMoE`."""

    def __init__(self, width: int, hidden: int, num_experts: int, k: int, *, rngs: nnx.Rngs):
        def kernels(*shape: int) -> nnx.Param:
            return nnx.Param(jax.vmap(lambda key: default_kernel_init(key, shape))(jax.random.split(rngs.params(), num_experts)))

        self.k = k
        self.router = nnx.Param(default_kernel_init(rngs.params(), (width, num_experts)))
        self.up, self.down, self.gate = kernels(width, hidden), kernels(hidden, width), kernels(width, hidden)

    def __call__(self, x: jax.Array, *, return_routing: bool) -> Any:
        logits = x @ self.router[...]
        p, experts = jax.nn.softmax(logits), self.router.shape[1]
        weights, indices = lax.top_k(p, self.k)
        chosen = jax.nn.one_hot(indices, experts)
        share = (chosen * (weights / weights.sum(-1, keepdims=True))[..., None]).sum(-2)
        h = jax.nn.silu(jnp.einsum("bti,eih->bteh", x, self.gate[...])) * jnp.einsum("bti,eih->bteh", x, self.up[...])
        y = jnp.einsum("bteh,eho,bte->bto", h, self.down[...], share)
        balance = experts * (chosen.mean((0, 1, 2)) * p.mean((0, 1))).sum()
        return y, PlainRouting(balance, (jax.nn.logsumexp(logits, -1) ** 2).mean())


_LOSSES: ContextVar[list[jax.Array] | None] = ContextVar("losses of routers", default=None)


class RoutedExperts(nnx.Module):
    """A mixture of experts as a layer of one output; `routing_losses` collects those of its router."""

    def __init__(self, experts: Any):
        self.experts = experts

    def __call__(self, x: jax.Array) -> jax.Array:
        y, routing = self.experts(x, return_routing=True)
        if (losses := _LOSSES.get()) is not None:
            losses.append(BALANCE * routing.balance_loss + Z * routing.z_loss)
        return y


@contextmanager
def routing_losses() -> Iterator[list[jax.Array]]:
    """Collects the losses of all routers that are called inside."""
    token = _LOSSES.set(losses := [])
    try:
        yield losses
    finally:
        _LOSSES.reset(token)
