"""A mixture of experts: each token goes through the multilayer perceptrons of its experts, and their outputs are added with its weights.

    the T k choices are sorted by expert once: row r is choice o_r, of token t_r, with the weight w_r and the expert g(r)
Forward   a_r = x_t U_g,   h_r = f(a_r), or with gates f(b_r) a_r, b_r = x_t V_g;     y_t = Σ_{r: t_r = t} w_r h_r D_g
Backward  e_r = dy_t D_gᵀ,   dw_r = h_r · e_r,   dh_r = w_r e_r;   da_r = dh_r f'(a_r), or with gates da_r = dh_r f(b_r), db_r = dh_r a_r f'(b_r)
          dD_g = Σ_r w_r h_rᵀ dy_t,   dU_g = Σ_r x_tᵀ da_r,   dV_g = Σ_r x_tᵀ db_r,   dx_t = Σ_r da_r U_gᵀ + db_r V_gᵀ

Products are grouped (`grouped_matmul.py`), so a choice that is none, and an expert that nothing chose, cost nothing.
Saved     x, the kernels, weights and indices, which are alive anyway, and the preactivations a and b.

Reference: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017; Gale et al., "MegaBlocks", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.elementwise import ACTIVATIONS, Activation, read_activation
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.rows import as_rows
from layers.experts.grouped_matmul import GroupedMatmulFunction, GroupedOuterFunction, block_for
from layers.experts.top_k_routing import counts_of
from layers.function.function import Function


class Permutation(NamedTuple):
    """The choices sorted by expert.

    Attributes:
        order: (choices,), which choice a row is.
        back: (choices,), which row a choice is.
        tokens: (choices,), whose choice a row is.
        sizes: (experts,), rows of each expert; those after all are of no expert.
    """

    order: jax.Array
    back: jax.Array
    tokens: jax.Array
    sizes: jax.Array

    @classmethod
    def of(cls, indices: jax.Array, experts: int) -> Permutation:
        order = jnp.argsort(indices.reshape(-1), stable=True)
        return cls(order, jnp.argsort(order), order // indices.shape[1], counts_of(indices, experts))

    def rows(self, x: jax.Array) -> jax.Array:
        """x of the token of each row."""
        return jnp.take(x, self.tokens, axis=0)

    def weights(self, weights: jax.Array) -> jax.Array:
        """(choices, 1): that of each row, 0 for a row of no expert."""
        inside = jnp.arange(len(self.order)) < self.sizes.sum()
        return jnp.where(inside, jnp.take(weights.reshape(-1), self.order), 0)[:, None]

    def sum_back(self, rows: jax.Array, k: int) -> jax.Array:
        """The rows of each token added up, in float32 or wider."""
        return jnp.take(rows, self.back, axis=0).reshape(-1, k, rows.shape[1]).astype(wide(rows.dtype)).sum(1)


class MoEFunction(Function):
    @staticmethod
    def forward(ctx, x, weights, indices, up, down, gate, activation):
        to = Permutation.of(indices, up.shape[0])
        xs = to.rows(x)
        a, b = _product(xs, up, to), None if gate is None else _product(xs, gate, to)
        ctx.save_for_backward(x, weights, indices, up, down, gate, a, b)
        ctx.activation = activation
        w = to.weights(weights)
        y = _product(_hidden(activation, a, b), down, to)
        return to.sum_back(w * y.astype(wide(y.dtype)), indices.shape[1]).astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, weights, indices, up, down, gate, a, b), dy = barrier(ctx.saved_tensors, dy)
        to, need = Permutation.of(indices, up.shape[0]), ctx.needs_input_grad
        dys, w = to.rows(dy), to.weights(weights)
        h, e = _hidden(ctx.activation, a, b), _product(dys, down, to, transposed=True)
        e = e.astype(wide(e.dtype))
        dw = jnp.take((h.astype(e.dtype) * e).sum(-1), to.back).reshape(weights.shape)
        ddown = _outer(_times(w, h), dys, to) if need[4] else None
        da, db = _hidden_back(ctx.activation, (w * e).astype(h.dtype), a, b)
        xs = to.rows(x) if need[3] or need[5] else None
        dx = None
        if need[0]:
            dx = to.sum_back(_product(da, up, to, transposed=True), indices.shape[1])
            if db is not None:
                dx = dx + to.sum_back(_product(db, gate, to, transposed=True), indices.shape[1])
        dgate = _outer(xs, db, to) if db is not None and need[5] else None
        return dx, dw, None, _outer(xs, da, to) if need[3] else None, ddown, dgate, None

    @staticmethod
    def jvp(ctx, x_dot, weights_dot, _indices, up_dot, down_dot, gate_dot, _activation):
        x, weights, indices, up, down, gate, a, b = ctx.saved_tensors
        to = Permutation.of(indices, up.shape[0])
        xs, xs_dot = to.rows(x), to.rows(x_dot)
        a_dot = _product(xs_dot, up, to) + _product(xs, up_dot, to)
        b_dot = None if gate is None else _product(xs_dot, gate, to) + _product(xs, gate_dot, to)
        h, h_dot = _hidden(ctx.activation, a, b), _hidden_forward(ctx.activation, a, b, a_dot, b_dot)
        y, y_dot = _product(h, down, to), _product(h_dot, down, to) + _product(h, down_dot, to)
        dtype = wide(y.dtype)
        tangents = to.weights(weights) * y_dot.astype(dtype) + to.weights(weights_dot) * y.astype(dtype)
        return to.sum_back(tangents, indices.shape[1]).astype(x.dtype)

    @staticmethod
    def surrogate(x, weights, indices, up, down, gate, activation):
        a = jnp.einsum("ti,eih->teh", x, up)
        h = activation.value(a) if gate is None else activation.value(jnp.einsum("ti,eih->teh", x, gate)) * a
        chosen = (indices[..., None] == jnp.arange(len(up))) * weights[..., None]
        return jnp.einsum("teo,te->to", jnp.einsum("teh,eho->teo", h, down), chosen.sum(1))

    @staticmethod
    def example(key, dtype):
        keys = jax.random.split(key, 5)
        shapes = ((5, 3), (5, 2), (4, 3, 6), (4, 6, 3), (4, 3, 6))
        x, w, up, down, gate = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
        return x, w, jnp.array([[0, 2], [2, 0], [2, 4], [3, 2], [4, 4]]), up, down, gate, ACTIVATIONS["silu"]

    @staticmethod
    def examples(key, dtype):
        x, weights, indices, up, down, gate, activation = MoEFunction.example(key, dtype)
        return {
            "no gate": (x, weights, indices, up, down, None, activation),
            "far out": (1e4 * x, weights, indices, up, down, gate, activation),
            "no expert for any token": (x, weights, indices * 0 + 4, up, down, gate, activation),
            "no tokens": (x[:0], weights[:0], indices[:0], up, down, gate, activation),
        }


def _product(x: Any, kernels: Any, to: Permutation, *, transposed: bool = False) -> jax.Array:
    return GroupedMatmulFunction.apply(x, kernels, to.sizes, block_for(len(x), len(kernels)), transposed)


def _outer(x: Any, y: Any, to: Permutation) -> jax.Array:
    return GroupedOuterFunction.apply(x, y, to.sizes, block_for(len(x), len(to.sizes)))


def _times(w: jax.Array, h: jax.Array) -> jax.Array:
    return (w * h.astype(wide(h.dtype))).astype(h.dtype)


def _hidden(activation: Activation, a: jax.Array, b: jax.Array | None) -> jax.Array:
    dtype = wide(a.dtype)
    if b is None:
        return activation.value(a.astype(dtype)).astype(a.dtype)
    return (activation.value(b.astype(dtype)) * a.astype(dtype)).astype(a.dtype)


def _hidden_forward(activation: Activation, a: Any, b: Any, a_dot: Any, b_dot: Any) -> jax.Array:
    """The tangent of h."""
    a_wide, a_dot = a.astype(wide(a.dtype)), a_dot.astype(wide(a.dtype))
    if b is None:
        return activation.pull(a_wide, a_dot).astype(a.dtype)
    b_wide, b_dot = b.astype(wide(b.dtype)), b_dot.astype(wide(b.dtype))
    return (activation.value(b_wide) * a_dot + activation.pull(b_wide, b_dot * a_wide)).astype(a.dtype)


def _hidden_back(activation: Activation, dh: jax.Array, a: jax.Array, b: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """da and db."""
    dtype = wide(a.dtype)
    dh, a_wide = dh.astype(dtype), a.astype(dtype)
    if b is None:
        return activation.pull(a_wide, dh).astype(a.dtype), None
    b_wide = b.astype(dtype)
    return (dh * activation.value(b_wide)).astype(a.dtype), activation.pull(b_wide, dh * a_wide).astype(a.dtype)


def moe(
    x: Float[Array, "*batch in_features"],
    weights: Float[Array, "*batch k"],
    indices: Int[Array, "*batch k"],
    up_kernels: Float[Array, "experts in_features hidden_features"],
    down_kernels: Float[Array, "experts hidden_features out_features"],
    gate_kernels: Float[Array, "experts in_features hidden_features"] | None = None,
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "silu",
    dtype: Any = None,
) -> Float[Array, "*batch out_features"]:
    """Sends each token through the experts that were chosen for it and adds their outputs, weighted.

    Args:
        x: tokens.
        weights, indices: as `top_k_routing` gives them. An index that is no expert's adds nothing: a token without experts gives 0.
        up_kernels: to the hidden layers.
        down_kernels: from them.
        gate_kernels: where given, the hidden layer is `f(x @ gate) * (x @ up)`, else `f(x @ up)`.
        activation: f, as in `mlp`.
        dtype: that of the products and the output; by default the common one of x and the kernels.

    Returns:
        `(*batch, out_features)`.

    Raises:
        ValueError: where shapes do not fit, or the activation is unknown. TypeError: where an array is of another kind.

    Reference: Shazeer et al., "Outrageously Large Neural Networks", 2017.
    """
    return compute("moe", x, weights, indices, up_kernels, down_kernels, gate_kernels, activation, dtype)


def compute(who: str, x: Any, weights: Any, indices: Any, up: Any, down: Any, gate: Any, activation: Any, dtype: Any) -> jax.Array:
    """`moe`, for the function and for the modules."""
    x, weights = checks.array(who, "x", x), checks.array(who, "weights", weights)
    indices = checks.array(who, "indices", indices, "integer")
    up = checks.array(who, "up_kernels", up, ndim=3)
    down = checks.array(who, "down_kernels", down, ndim=3)
    gate = checks.array(who, "gate_kernels", gate, ndim=3, optional=True)
    f, dtype = read_activation(who, activation), checks.dtype(who, "dtype", dtype)
    if x.ndim < 1 or x.shape[-1] != up.shape[1]:
        raise ValueError(
            f"{who}: up_kernels has shape {up.shape}, but must be (experts, in_features, hidden_features) with those of x (x: {x.shape})"
        )
    checks.shape(who, "down_kernels", down, (up.shape[0], up.shape[2], down.shape[2]), "(experts, hidden_features, out_features)", up_kernels=up)
    checks.shape(who, "gate_kernels", gate, up.shape, "(experts, in_features, hidden_features)", up_kernels=up)
    if indices.ndim != x.ndim or indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{who}: indices has shape {indices.shape}, but must be (*batch, k) with the batch of x (x: {x.shape})")
    checks.shape(who, "weights", weights, indices.shape, "(*batch, k)", indices=indices)
    dtype = jnp.result_type(x, up, down) if dtype is None else dtype
    if not indices.size or not up.shape[0]:
        return jnp.zeros((*x.shape[:-1], down.shape[2]), dtype)
    indices = jnp.where((indices >= 0) & (indices < up.shape[0]), indices, up.shape[0]).astype(jnp.int32)
    arrays = [a if a is None else a.astype(dtype) for a in (up, down, gate)]
    y = MoEFunction.apply(as_rows(x).astype(dtype), as_rows(weights), as_rows(indices), *arrays, f)
    return y.reshape(*x.shape[:-1], down.shape[2])
