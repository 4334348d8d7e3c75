"""Mixtures of experts as modules: a router, and the multilayer perceptrons that it chooses from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init

from layers.core import checks
from layers.core.elementwise import read_activation
from layers.core.rows import as_rows
from layers.experts.moe import compute
from layers.experts.router import RouterFunction
from layers.experts.top_k_routing import SCORES, route


class RouterBias(nnx.Variable):
    """What is added to the scores of experts where they are chosen: no parameter, it is balanced by `balance`."""


class MoE(nnx.Module):
    """A mixture of multilayer perceptrons, by `top_k_routing` and `moe`; the router's product is of float32.

    Args:
        in_features: of the input.
        hidden_features: of the hidden layer of each expert.
        num_experts: how many there are.
        k: how many each token goes to.
        out_features: of the output; None for those of the input.
        activation: as in `mlp`.
        scores: "softmax" or "sigmoid", as in `top_k_routing`.
        normalize: whether the weights of a token sum to 1.
        capacity_factor: the most tokens of an expert over the mean number; choices beyond are dropped. None drops nothing.
        use_balance_bias: whether there is a bias that balances the experts without a loss; see `balance`.
        dtype: of the experts' computation; by default the common one of input and parameters.
        param_dtype: of the experts' kernels; that of the router is float32 at least.
        kernel_init: makes the kernel of the router and of each expert.
        rngs: where random numbers come from.

    Attributes:
        router: (in_features, num_experts).
        up, down: (num_experts, in_features, hidden_features) and (num_experts, hidden_features, out_features).
        bias: (num_experts,), or None.
    """

    gated = False

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        k: int,
        out_features: int | None = None,
        *,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        scores: str = "softmax",
        normalize: bool = True,
        capacity_factor: float | None = None,
        use_balance_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        who, size = type(self).__name__, "[1, 2147483647]"
        sizes = {"in_features": in_features, "hidden_features": hidden_features, "num_experts": num_experts}
        ins, hidden, experts = (checks.integer(who, what, value, size) for what, value in sizes.items())
        self.k = checks.integer(who, "k", k, f"[1, {experts}]")
        outs = checks.integer(who, "out_features", out_features, size, optional=True) or ins
        self.activation = ("silu" if self.gated else "gelu") if activation is None else activation
        read_activation(who, self.activation)
        self.scores, self.normalize = checks.choice(who, "scores", scores, SCORES), checks.flag(who, "normalize", normalize)
        self.capacity_factor = checks.number(who, "capacity_factor", capacity_factor, "(0, inf)", optional=True)
        self.dtype, self.param_dtype = checks.dtype(who, "dtype", dtype), checks.dtype(who, "param_dtype", param_dtype, optional=False)
        kernel_init = checks.function(who, "kernel_init", kernel_init)

        def kernels(*shape: int) -> nnx.Param:
            made = jax.vmap(lambda key: kernel_init(key, shape, self.param_dtype))(jax.random.split(rngs.params(), experts))
            return nnx.Param(made)

        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        self.router = nnx.Param(kernel_init(rngs.params(), (ins, experts), wide))
        self.up, self.down = kernels(ins, hidden), kernels(hidden, outs)
        self.gate = kernels(ins, hidden) if self.gated else None
        self.bias = RouterBias(jnp.zeros(experts, wide)) if checks.flag(who, "use_balance_bias", use_balance_bias) else None

    def __call__(self, x: Any, mask: Any = None, *, return_routing: bool = False) -> Any:
        """The output (*batch, out_features); with `return_routing` also the `Routing`, whose losses are to be added to that of the model.

        `mask` (*batch) is True for tokens; padding goes nowhere, gives 0 and counts for nothing, whatever it holds.
        """
        who = type(self).__name__
        x, return_routing = checks.array(who, "x", x), checks.flag(who, "return_routing", return_routing)
        checks.shape(who, "x", x, (*x.shape[:-1], self.router.shape[0]), "(*batch, in_features)")
        mask = checks.array(who, "mask", mask, "mask", optional=True)
        checks.shape(who, "mask", mask, x.shape[:-1], "(*batch)", x=x)
        x = x if mask is None else jnp.where(mask[..., None] != 0, x, 0)
        logits = RouterFunction.apply(as_rows(x), self.router[...]).reshape(*x.shape[:-1], self.router.shape[1])
        bias = None if self.bias is None else self.bias[...]
        routing = route(who, logits, self.k, self.scores, bias, self.normalize, self._capacity(math.prod(x.shape[:-1])), mask)
        gate = None if self.gate is None else self.gate[...]
        y = compute(who, x, routing.weights, routing.indices, self.up[...], self.down[...], gate, self.activation, self.dtype)
        return (y, routing) if return_routing else y

    def _capacity(self, tokens: int) -> int | None:
        factor = self.capacity_factor
        return None if factor is None else math.ceil(factor * tokens * self.k / self.router.shape[1])

    def balance(self, counts: Any, rate: float = 1e-3) -> None:
        """Moves the bias by `rate` towards experts that fewer tokens than the mean went to; `counts` are those of a step's `Routing`.

        Reference: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024.
        """
        who = f"{type(self).__name__}.balance"
        if self.bias is None:
            raise ValueError(f"{who}: there is no bias: make the module with use_balance_bias=True")
        counts, rate = checks.array(who, "counts", counts, "real"), checks.number(who, "rate", rate, "[0, inf)", traced=True)
        checks.shape(who, "counts", counts, self.bias.shape, "(num_experts,)")
        counts = counts.astype(self.bias.dtype)
        self.bias[...] = self.bias[...] + rate * jnp.sign(counts.mean() - counts)


class GatedMoE(MoE):
    """A mixture of gated perceptrons, as `MoE` and with its arguments; the activation is "silu" by default.

    Attributes:
        gate: (num_experts, in_features, hidden_features).
    """

    gated = True
