"""A linear layer whose three matrix products are of 8-bit floating-point numbers.

    q(a) = the nearest number of the format to a / s, with s = max|a| / (the largest of the format);      x ≈ s_x q_x,   kernel ≈ s_w q_w   (E4M3)
Forward   y = s_x s_w (q_x q_w) + bias
Backward  a tensor    dy ≈ s_g q_g (E5M2):        dx = s_g s_w (q_g q_wᵀ),   dkernel = s_x s_g (q_xᵀ q_g),   dbias = Σ dy
          a channel   g = dy s_w ≈ s_g q_g a row:      dx = s_g (q_g q_wᵀ)
                      h = dy s_x ≈ s_h q_h a column:   dkernel = s_h (q_xᵀ q_h)

A scale is that of a tensor, or of a channel: of each row of x and each column of the kernel, along the axis that is summed over. The product of dx
sums over the columns of the kernel, so their scale goes into dy before that is rounded; that of dkernel sums over rows, and so does the scale of x.
But for the rounding of dy this is the gradient of the product of the rounded x and kernel, passed straight through their rounding.

The rule is not linear in dy, so no function has exactly this gradient; forward mode, which has no gradient to round, is that of the product of the
rounded operands, and a second derivative is refused.
Saved     q_x and q_w, one byte an entry, and their scales.

Reference: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, for the formats and which goes where; the scales are those of the tensors at
hand ("current scaling" in NVIDIA's Transformer Engine).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.numerics import safe_reciprocal, wide
from layers.core.products import einsum, matmul
from layers.core.rows import as_rows
from layers.function.function import Function, once_differentiable
from layers.quantization.narrow_floats import E4M3, E5M2, Format, narrow_product, rounded
from layers.quantization.narrow_linear import NarrowLinear, check_linear, like_linear
from layers.quantization.scales import rescaled, scale_to

SCALINGS = ("tensor", "channel")
ROUNDINGS = ("nearest", "none")


class Fp8LinearFunction(Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, scaling, rounding):
        qx, sx = _narrow(x, E4M3, 1, scaling)
        qw, sw = _narrow(kernel, E4M3, 0, scaling)
        ctx.save_for_backward(qx, sx, qw, sw)
        ctx.scaling, ctx.rounding, ctx.dtype = scaling, rounding, x.dtype
        y = rescaled(narrow_product(qx, qw, (1, 0), _sum_dtype(x.dtype)), sx, sw)
        return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        qx, sx, qw, sw = ctx.saved_tensors
        g = dy.astype(wide(dy.dtype))
        dx, dkernel = _gradients(g, qx, sx, qw, sw, ctx.scaling, ctx.rounding, ctx.dtype, ctx.needs_input_grad)
        return dx, dkernel, g.sum(0) if ctx.needs_input_grad[2] else None, None, None

    @staticmethod
    def jvp(ctx, x_dot, kernel_dot, bias_dot, *_):
        qx, sx, qw, sw = ctx.saved_tensors
        y_dot = matmul(x_dot.astype(sx.dtype), qw.astype(sw.dtype) * sw) + matmul(qx.astype(sx.dtype) * sx, kernel_dot.astype(sw.dtype))
        return (y_dot if bias_dot is None else y_dot + bias_dot).astype(ctx.dtype)

    @staticmethod
    def surrogate(x, kernel, bias, scaling, rounding):
        def narrowed(a, axis):
            step = jnp.maximum(jnp.abs(a).max(axis if scaling == "channel" else None, keepdims=True).astype(jnp.float32) / 448, 1e-30)
            return a + lax.stop_gradient((a / step).astype(jnp.float8_e4m3fn).astype(a.dtype) * step - a)

        return matmul(narrowed(x, 1), narrowed(kernel, 0)) + (0 if bias is None else bias)

    @staticmethod
    def example(key, dtype):
        shapes = ((5, 3), (3, 4), (4,))
        return (*(jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)), "channel", "none")

    @staticmethod
    def examples(key, dtype):
        x, kernel, bias, _, rounding = Fp8LinearFunction.example(key, dtype)
        return {
            "no bias": (x, kernel, None, "tensor", rounding),
            "far out": (1e4 * x, kernel, None, "tensor", rounding),
            "a row of zeros": (x.at[0].set(0), kernel, bias, "channel", rounding),
            "no rows": (x[:0], kernel, bias, "tensor", rounding),
        }


def _narrow(a: jax.Array, to: Format, axis: int, scaling: str) -> tuple[jax.Array, jax.Array]:
    """The matrix in the format, and its scale: (1, 1), or for channels one along `axis`; 0 where all is 0."""
    a = a.astype(wide(a.dtype))
    scale = scale_to(to.largest, jnp.abs(a).max(axis if scaling == "channel" else None, keepdims=True, initial=0))
    return rounded(a * safe_reciprocal(scale), to), scale


def _gradients(
    g: jax.Array,
    qx: jax.Array,
    sx: jax.Array,
    qw: jax.Array,
    sw: jax.Array,
    scaling: str,
    rounding: str,
    dtype: Any,
    needed: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """dx and dkernel, each where it is needed."""
    if rounding == "none":
        dx = einsum("ij,kj->ik", g * sw, qw.astype(g.dtype)) if needed[0] else None
        return dx, einsum("ik,ij->kj", qx.astype(g.dtype), g * sx) if needed[1] else None
    if scaling == "tensor":
        qg, sg = _narrow(g, E5M2, 1, scaling)
        dx = rescaled(narrow_product(qg, qw, (1, 1), _sum_dtype(dtype)), sg, sw) if needed[0] else None
        return dx, rescaled(narrow_product(qx, qg, (0, 0), jnp.float32), sx, sg) if needed[1] else None
    dx = dkernel = None
    if needed[0]:
        qg, sg = _narrow(g * sw, E5M2, 1, scaling)
        dx = rescaled(narrow_product(qg, qw, (1, 1), _sum_dtype(dtype)), sg)
    if needed[1]:
        qh, sh = _narrow(g * sx, E5M2, 0, scaling)
        dkernel = rescaled(narrow_product(qx, qh, (0, 0), jnp.float32), sh)
    return dx, dkernel


def _sum_dtype(dtype: Any) -> Any:
    """What a product is rounded to before its scales: bfloat16 where that is the result's, which spares half of the memory."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def fp8_linear(
    x: Float[Array, "*batch in_features"],
    kernel: Float[Array, "in_features out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    scaling: str = "tensor",
    gradient_rounding: str = "nearest",
) -> Float[Array, "*batch out_features"]:
    """Computes `x @ kernel + bias` in 8-bit floating point, forward in E4M3 and backward in E5M2.

    Backward keeps one byte for each entry of `x` and `kernel`, and neither of them itself. Accelerators with units for 8-bit numbers use them where
    both features are multiples of 16; everywhere else the same numbers are multiplied in float32.

    Args:
        x: any number of leading axes.
        kernel: Flax's layout.
        bias: is added in floating point; or None.
        scaling: "tensor", one scale for all of `x`, of `kernel` and of the gradient; or "channel", one for each row of `x` and each column of
            `kernel`, which is more exact and for which the gradient is rounded twice.
        gradient_rounding: "nearest"; or "none" for floating-point products in backward.

    Returns:
        `(*batch, out_features)`, of the dtype of `x`. A row of zeros gives `bias`, and finite gradients.

    Raises:
        ValueError: where the shapes do not fit, or an option is unknown. TypeError: where an array is not of a floating-point dtype.

    Reference: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    return _linear("fp8_linear", x, kernel, bias, scaling, gradient_rounding)


def _linear(who: str, x: Any, kernel: Any, bias: Any, scaling: str, rounding: str) -> jax.Array:
    x, kernel, bias = check_linear(who, x, kernel, bias)
    checks.choice(who, "scaling", scaling, SCALINGS)
    checks.choice(who, "gradient_rounding", rounding, ROUNDINGS)
    y = Fp8LinearFunction.apply(as_rows(x), kernel, bias, scaling, rounding)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


class Fp8Linear(NarrowLinear):
    """`flax.nnx.Linear`, the same in constructor and parameters, by `fp8_linear`.

    Args:
        scaling, gradient_rounding: as in `fp8_linear`.

    Raises:
        ValueError: for a `precision`, `dot_general` or `preferred_element_type` of one's own: the products are of 8-bit numbers.
    """

    scaling = "tensor"
    gradient_rounding = "nearest"

    @like_linear
    def __init__(self, *args: Any, scaling: str = "tensor", gradient_rounding: str = "nearest", **options: Any):
        self._check_and_make(args, options)
        self.scaling = checks.choice("Fp8Linear", "scaling", scaling, SCALINGS)
        self.gradient_rounding = checks.choice("Fp8Linear", "gradient_rounding", gradient_rounding, ROUNDINGS)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return _linear("Fp8Linear", *self._operands(inputs, out_sharding), self.scaling, self.gradient_rounding)

    @classmethod
    def swap_obstacle(cls, layer: Any) -> str:
        """Why a Flax layer cannot become this one; empty where it can."""
        if layer.in_features % 16 or layer.out_features % 16:
            return f"{layer.in_features} and {layer.out_features} features are not both multiples of 16, as 8-bit products need"
        return cls.own_options(layer)
