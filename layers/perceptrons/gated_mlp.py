"""A multilayer perceptron whose hidden layer is gated, as one layer.

    g = x gate_kernel + gate_bias,   u = x up_kernel + up_bias,   h = f(g) u,   y = h down_kernel + down_bias

    dh = dy down_kernelᵀ,   dg = dh u f'(g),   du = dh f(g),   dx = dg gate_kernelᵀ + du up_kernelᵀ
    dgate_kernel = xᵀ dg,   dup_kernel = xᵀ du,   ddown_kernel = hᵀ dy,   and the biases' the sums of dg, du, dy

in blocks of rows (`blocks.py`), with f and its derivative from `core/elementwise.py`.

Saved: the arguments; with `save="preactivations"` also g and u, which spares backward two products of matrices of eight. h is never kept.

Reference: Shazeer, "GLU Variants Improve Transformer", 2020; for the recomputation in tiles, Hsu et al., "Liger Kernel", 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jaxtyping import Array, Float

from layers.core.constants import refuse_gradient
from layers.core.elementwise import SILU, Activation
from layers.core.rows import as_rows
from layers.function.function import Function
from layers.perceptrons import arguments
from layers.perceptrons.arguments import Options
from layers.perceptrons.blocks import Affine, Needs, Plan, run, run_back
from layers.perceptrons.perceptron import Perceptron


class Gated(NamedTuple):
    """h = f(g) u, dg = dh u f'(g) and du = dh f(g)."""

    f: Activation

    def value(self, g: jax.Array, u: jax.Array) -> jax.Array:
        return self.f.value(g) * u

    def pull(self, dh: jax.Array, g: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.f.pull(g, dh * u), dh * self.f.value(g)


class GatedMLPFunction(Function):
    """With an `up_kernel` of None, `gate_kernel` and `gate_bias` hold both, that of the gate first: what is saved is the whole."""

    @staticmethod
    def forward(ctx, x, gate_kernel, up_kernel, down_kernel, gate_bias, up_bias, down_bias, norm_scale, plan):
        ups = _apart(Affine(gate_kernel, gate_bias), Affine(up_kernel, up_bias))
        y, kept = run(x, norm_scale, ups, Affine(down_kernel, down_bias), plan)
        ctx.save_for_backward(x, kept, gate_kernel, up_kernel, down_kernel, gate_bias, up_bias, down_bias, norm_scale)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, kept, gate_kernel, up_kernel, down_kernel, gate_bias, up_bias, down_bias, norm_scale = ctx.saved_tensors
        needs_x, gate, up, down, gate_b, up_b, down_b, scale, options = ctx.needs_input_grad
        refuse_gradient("gated_mlp", "what epsilon, dropout_rate or activation hold", options)
        fused = up_kernel is None
        ups, needs = _apart(Affine(gate_kernel, gate_bias), Affine(up_kernel, up_bias)), [Affine(gate, gate_b)] * 2
        needs = needs if fused else [needs[0], Affine(up, up_b)]
        ends = Affine(down_kernel, down_bias), ctx.plan, Needs(needs_x, scale, needs, Affine(down, down_b))
        dx, dscale, (dgate, dup), ddown = run_back(dy, x, norm_scale, kept, ups, *ends)
        if fused:
            dgate = Affine(*(None if g is None else jnp.concatenate([g, u], -1) for g, u in zip(dgate, dup, strict=True)))
            dup = Affine(None, None)
        return dx, dgate.kernel, dup.kernel, ddown.kernel, dgate.bias, dup.bias, ddown.bias, dscale, None

    @staticmethod
    def example(key, dtype):
        shapes = (5, 3), (3, 7), (3, 7), (7, 4), (7,), (7,), (4,), (3,)
        arrays = [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 8), shapes, strict=True)]
        return *arrays, Plan(Gated(SILU), keep=True, block=2, epsilon=1e-6)

    @staticmethod
    def examples(key, dtype):
        x, gate, up, down, *biases, scale, _ = GatedMLPFunction.example(key, dtype)
        none, plain = (None, None, None, None), Plan(Gated(SILU), keep=False)
        words = jnp.array([1, 2], jnp.uint32)
        return {
            "plain": (x, gate, up, down, *none, plain),
            "far out": (1e4 * x, gate, up, down, *none, plain),
            "both kernels in one": (x, jnp.concatenate([gate, up], 1), None, down, jnp.concatenate(biases[:2]), None, biases[2], None, plain),
            "dropped, products in float64": (
                x,
                gate,
                up,
                down,
                *biases,
                scale,
                plain._replace(rate=0.3, words=words, scale_offset=1.0, dtype=jnp.float64),
            ),
            "one row": (x[:1], gate, up, down, *biases, scale, plain),
            "no rows": (x[:0], gate, up, down, *biases, scale, plain),
        }


def _apart(gate: Affine, up: Affine) -> list[Affine]:
    """The two maps, of one that may hold both."""
    if up.kernel is not None:
        return [gate, up]
    kernels = jnp.split(gate.kernel, 2, 1)
    return [Affine(*pair) for pair in zip(kernels, [None] * 2 if gate.bias is None else jnp.split(gate.bias, 2), strict=True)]


def gated_mlp(
    x: Float[Array, "*batch in_features"],
    gate_kernel: Float[Array, "in_features hidden_features"],
    up_kernel: Float[Array, "in_features hidden_features"] | None,
    down_kernel: Float[Array, "hidden_features out_features"],
    gate_bias: Float[Array, " hidden_features"] | None = None,
    up_bias: Float[Array, " hidden_features"] | None = None,
    down_bias: Float[Array, " out_features"] | None = None,
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "silu",
    save: str = "preactivations",
    dtype: Any = None,
    block_size: int | None = None,
    norm_scale: Float[Array, " in_features"] | None = None,
    epsilon: float | Float[Array, ""] = 1e-6,
    scale_offset: float = 0.0,
    dropout_rate: float | Float[Array, ""] = 0.0,
    dropout_key: Any = None,
) -> Float[Array, "*batch out_features"]:
    """Computes `(f(x @ gate_kernel) * (x @ up_kernel)) @ down_kernel` without ever holding the hidden layer whole.

    Products add up in float32 or wider, and so do the gradients of the kernels over the blocks of rows; those of parameters that are not
    differentiated are not computed.

    Args:
        x: rows of features.
        gate_kernel: to what goes through the activation; without `up_kernel` to both, (in_features, 2 * hidden_features), the gate first.
        up_kernel: to what is multiplied by it; or None.
        down_kernel: from the hidden layer.
        gate_bias: is added to the first product; or None. Of both as well, without `up_kernel`.
        up_bias: is added to the second; or None.
        down_bias: is added at the end; or None.
        activation: f, as in `mlp`: "silu" makes a SwiGLU, "gelu" a GEGLU.
        save: what stays for backward: "preactivations", both products, which then costs what that of autodiff costs; or "inputs", nothing but
            the arguments, and backward computes both again.
        dtype: that of the products and the output; by default the common one of the arrays.
        block_size: rows in a block; None to choose so that a block of the hidden layer stays in the caches.
        norm_scale: where given, all this is of `rms_norm(x, norm_scale, epsilon=epsilon)`, which is then not kept for backward.
        epsilon: of that norm.
        scale_offset: of that norm: is added to its scale (1 for Gemma).
        dropout_rate: the probability that an element of the hidden layer is set to zero, in [0, 1]; the others are divided by 1 - dropout_rate.
        dropout_key: a key of `jax.random`. The mask is that of `layers.dropout(hidden, dropout_key, rate=dropout_rate)`, drawn again in backward.

    Returns:
        `(*batch, out_features)`.

    Raises:
        ValueError: for shapes that do not fit, an unknown activation or `save`, a negative epsilon, a rate outside [0, 1] or without a key.
        TypeError: where an array is not of a real floating-point dtype, `dropout_key` is no key, or the gradient of `epsilon` or `dropout_rate` is
            asked for.
    """
    options = Options(activation, save, dtype, block_size, norm_scale, epsilon, scale_offset, dropout_rate, dropout_key)
    return _compute("gated_mlp", x, gate_kernel, up_kernel, down_kernel, gate_bias, up_bias, down_bias, options)


def _compute(
    who: str, x: Any, gate_kernel: Any, up_kernel: Any, down_kernel: Any, gate_bias: Any, up_bias: Any, down_bias: Any, options: Options
) -> jax.Array:
    """`gated_mlp`, for the function and for the module."""
    x, fused = arguments.rows(who, x), up_kernel is None
    ups = {"gate_kernel": gate_kernel} | ({} if fused else {"up_kernel": up_kernel})
    gate_kernel, *up, down_kernel = arguments.kernels(who, x, down_kernel, fused, **ups)
    sizes = {"gate_bias": gate_kernel.shape[1], "up_bias": 0 if fused else gate_kernel.shape[1], "down_bias": down_kernel.shape[1]}
    found = arguments.biases(who, sizes, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    if fused and found[1] is not None:
        raise ValueError(f"{who}: up_bias is given, but without up_kernel must be None: gate_bias holds both")
    norm_scale, plan = arguments.plan(who, x, options, Gated)
    y = GatedMLPFunction.apply(as_rows(x), gate_kernel, up[0] if up else None, down_kernel, *found, norm_scale, plan)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class GatedMLP(Perceptron):
    """A gated multilayer perceptron, by `gated_mlp`; parameters as those of three `flax.nnx.Linear` named `gate`, `up` and `down`.

    Args:
        in_features: of the input.
        hidden_features: of the hidden layer.
        out_features: of the output; None for those of the input.
        activation: as in `gated_mlp`.
        use_bias: whether the linear maps have a bias.
        dtype: of the computation; by default the common one of input and parameters.
        param_dtype: of the parameters.
        kernel_init: makes the kernels.
        bias_init: makes the biases.
        save: what stays for backward, as in `gated_mlp`.
        block_size: as in `gated_mlp`.
        dropout_rate: as in `gated_mlp`.
        deterministic: whether nothing is dropped, as of `flax.nnx.Dropout`: what the call says goes before it, and `eval()`, `train()` and `nnx.view`
            set it.
        rngs: where random numbers come from; of dropout, from its stream "dropout".
    """

    maps = ("gate", "up", "down")
    gate: nnx.Linear
    compute = staticmethod(_compute)

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str | Callable[[jax.Array], jax.Array] = "silu",
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = default_bias_init,
        save: str = "preactivations",
        block_size: int | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = False,
        rngs: nnx.Rngs,
    ):
        parameters = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "kernel_init": kernel_init, "bias_init": bias_init}
        options = {"activation": activation, "save": save, "block_size": block_size}
        super().__init__((in_features, hidden_features, out_features), parameters, options, (dropout_rate, deterministic), rngs)
