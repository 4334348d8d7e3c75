"""A multilayer perceptron with one hidden layer, as one layer.

    a = x up_kernel + up_bias,   h = f(a),   y = h down_kernel + down_bias

    dh = dy down_kernelᵀ,   da = dh f'(a),   dx = da up_kernelᵀ
    dup_kernel = xᵀ da,   dup_bias = Σ da,   ddown_kernel = hᵀ dy,   ddown_bias = Σ dy

in blocks of rows (`blocks.py`), with f and its derivative from `core/elementwise.py`.

Saved: the arguments; with `save="preactivations"` also a, which spares backward one product of matrices of six. h is never kept.

Reference: Rumelhart, Hinton and Williams, "Learning Representations by Back-Propagating Errors", 1986; for the recomputation in tiles,
Hsu et al., "Liger Kernel", 2024.
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
from layers.core.elementwise import GELU, Activation
from layers.core.rows import as_rows
from layers.function.function import Function
from layers.perceptrons import arguments
from layers.perceptrons.arguments import Options
from layers.perceptrons.blocks import Affine, Needs, Plan, run, run_back
from layers.perceptrons.perceptron import Perceptron


class Plain(NamedTuple):
    """h = f(a) and da = dh f'(a)."""

    f: Activation

    def value(self, a: jax.Array) -> jax.Array:
        return self.f.value(a)

    def pull(self, dh: jax.Array, a: jax.Array) -> tuple[jax.Array]:
        return (self.f.pull(a, dh),)


class MLPFunction(Function):
    @staticmethod
    def forward(ctx, x, up_kernel, down_kernel, up_bias, down_bias, norm_scale, plan):
        y, a = run(x, norm_scale, [Affine(up_kernel, up_bias)], Affine(down_kernel, down_bias), plan)
        ctx.save_for_backward(x, a, up_kernel, down_kernel, up_bias, down_bias, norm_scale)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, a, up_kernel, down_kernel, up_bias, down_bias, norm_scale = ctx.saved_tensors
        needs_x, up, down, up_b, down_b, scale = ctx.needs_input_grad[:6]
        refuse_gradient("mlp", "what epsilon, dropout_rate or activation hold", ctx.needs_input_grad[6])
        needs = Needs(needs_x, scale, [Affine(up, up_b)], Affine(down, down_b))
        dx, dscale, (dup,), ddown = run_back(dy, x, norm_scale, a, [Affine(up_kernel, up_bias)], Affine(down_kernel, down_bias), ctx.plan, needs)
        return dx, dup.kernel, ddown.kernel, dup.bias, ddown.bias, dscale, None

    @staticmethod
    def example(key, dtype):
        shapes = (5, 3), (3, 7), (7, 4), (7,), (4,), (3,)
        arrays = [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 6), shapes, strict=True)]
        return *arrays, Plan(Plain(GELU), keep=False, block=2, epsilon=1e-6, rate=0.3, words=jnp.array([1, 2], jnp.uint32))

    @staticmethod
    def examples(key, dtype):
        x, up, down, up_bias, down_bias, scale, _ = MLPFunction.example(key, dtype)
        plain = Plan(Plain(GELU), keep=True)
        return {
            "plain": (x, up, down, None, None, None, plain),
            "far out": (1e4 * x, up, down, None, None, None, plain),
            "an offset of the scale, products in float64": (
                x,
                up,
                down,
                up_bias,
                down_bias,
                scale,
                plain._replace(scale_offset=1.0, dtype=jnp.float64),
            ),
            "one row": (x[:1], up, down, up_bias, down_bias, scale, plain),
            "no rows": (x[:0], up, down, up_bias, down_bias, scale, plain),
        }


def mlp(
    x: Float[Array, "*batch in_features"],
    up_kernel: Float[Array, "in_features hidden_features"],
    down_kernel: Float[Array, "hidden_features out_features"],
    up_bias: Float[Array, " hidden_features"] | None = None,
    down_bias: Float[Array, " out_features"] | None = None,
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "gelu",
    save: str = "preactivations",
    dtype: Any = None,
    block_size: int | None = None,
    norm_scale: Float[Array, " in_features"] | None = None,
    epsilon: float | Float[Array, ""] = 1e-6,
    scale_offset: float = 0.0,
    dropout_rate: float | Float[Array, ""] = 0.0,
    dropout_key: Any = None,
) -> Float[Array, "*batch out_features"]:
    """Computes `f(x @ up_kernel + up_bias) @ down_kernel + down_bias` without ever holding the hidden layer whole.

    Products add up in float32 or wider, and so do the gradients of the kernels over the blocks of rows; those of parameters that are not
    differentiated are not computed.

    Args:
        x: rows of features.
        up_kernel: to the hidden layer.
        down_kernel: from it.
        up_bias: is added before the activation; or None.
        down_bias: is added at the end; or None.
        activation: f, the name of one in `jax.nn`: "gelu" (by a hyperbolic tangent), "gelu_exact", "relu", "silu", "relu_squared" (of relu),
            "mish", "softplus", "tanh"; or any function of each element, whose derivative is then JAX's.
        save: what stays for backward: "preactivations", which then costs what that of autodiff costs; or "inputs", nothing but the arguments,
            and backward computes the hidden layer again, one product of matrices more.
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
    return _compute("mlp", x, up_kernel, down_kernel, up_bias, down_bias, options)


def _compute(who: str, x: Any, up_kernel: Any, down_kernel: Any, up_bias: Any, down_bias: Any, options: Options) -> jax.Array:
    """`mlp`, for the function and for the module."""
    x = arguments.rows(who, x)
    up_kernel, down_kernel = arguments.kernels(who, x, down_kernel, up_kernel=up_kernel)
    sizes = {"up_bias": up_kernel.shape[1], "down_bias": down_kernel.shape[1]}
    up_bias, down_bias = arguments.biases(who, sizes, up_bias=up_bias, down_bias=down_bias)
    norm_scale, plan = arguments.plan(who, x, options, Plain)
    y = MLPFunction.apply(as_rows(x), up_kernel, down_kernel, up_bias, down_bias, norm_scale, plan)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class MLP(Perceptron):
    """A multilayer perceptron with one hidden layer, by `mlp`; parameters as those of two `flax.nnx.Linear` named `up` and `down`.

    Args:
        in_features: of the input.
        hidden_features: of the hidden layer.
        out_features: of the output; None for those of the input.
        activation: as in `mlp`.
        use_bias: whether both linear maps have a bias.
        dtype: of the computation; by default the common one of input and parameters.
        param_dtype: of the parameters.
        kernel_init: makes the kernels.
        bias_init: makes the biases.
        save: what stays for backward, as in `mlp`.
        block_size: as in `mlp`.
        dropout_rate: as in `mlp`.
        deterministic: whether nothing is dropped, as of `flax.nnx.Dropout`: what the call says goes before it, and `eval()`, `train()` and `nnx.view`
            set it.
        rngs: where random numbers come from; of dropout, from its stream "dropout".
    """

    maps = ("up", "down")
    compute = staticmethod(_compute)

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str | Callable[[jax.Array], jax.Array] = "gelu",
        use_bias: bool = True,
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
