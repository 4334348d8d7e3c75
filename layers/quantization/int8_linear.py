"""A linear layer whose three matrix products are of 8-bit integers.

    q(a) = round(a / s) with s = max|a| / 127, along the axis that is summed over;   x ≈ s_x q_x a row,   kernel ≈ s_w q_w a column
Forward   y = s_x s_w (q_x q_w) + bias
Backward  g = dy s_w,   g ≈ s_g q_g a row:      dx = s_g (q_g q_wᵀ)
          h = dy s_x,   h ≈ s_h q_h a column:   dkernel = s_h (q_xᵀ q_h),   dbias = Σ dy

The products are summed in int32. That of dx sums over the columns of the kernel, so their scale goes into dy before that is quantised; that of
dkernel sums over rows, and so does the scale of x. But for the rounding of g and h this is the gradient of the dequantised product
(s_x q_x) (s_w q_w), with the rounding of x and kernel passed straight through. Rounded to the nearest, g and h are within half a step; rounded at
random, up with the probability of the remainder, they are right in the mean; "none" leaves them and multiplies in floating point.

The rule is not linear in dy, so no function has exactly this gradient; forward mode, which has no gradient to round, is that of the dequantised
product, and a second derivative is refused.
Saved     q_x, q_w (int8) and their scales.

Reference: Dettmers et al., "LLM.int8()", 2022, for the scales; Xi et al., "Jetfire: Efficient and Accurate Transformer Pretraining with INT8 Data
Flow", 2024, for int8 in both directions; Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, for rounding at random.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.numerics import safe_reciprocal, wide
from layers.core.products import matmul
from layers.core.rows import as_rows
from layers.core.sharding import explicit_sharding
from layers.function.function import Function, once_differentiable
from layers.quantization.narrow_linear import NarrowLinear, check_linear, like_linear
from layers.quantization.scales import rescaled, scale_to

ROUNDINGS = ("nearest", "stochastic", "none")

MOST_TERMS = 1 << 17
"""Products of 127 · 127 that an int32 can hold the sum of."""


class Int8LinearFunction(Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, key, rounding):
        qx, sx = _quantized(x, axis=1)
        qw, sw = _quantized(kernel, axis=0)
        ctx.save_for_backward(qx, sx, qw, sw)
        ctx.key, ctx.rounding, ctx.dtype = key, rounding, x.dtype
        y = rescaled(_product(qx, qw), sx, sw)
        return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        qx, sx, qw, sw = ctx.saved_tensors
        dx = dkernel = None
        g = dy.astype(sx.dtype)
        if ctx.needs_input_grad[0]:
            dx = _gradient_product(g * sw, qw.T, ctx.rounding, _fold(ctx.key, 0))
        if ctx.needs_input_grad[1]:
            like = explicit_sharding(qw)
            dkernel = _gradient_product((g * sx).T, qx, ctx.rounding, _fold(ctx.key, 1), None if like is None else _swapped(like)).T
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dkernel, dbias, None, None

    @staticmethod
    def jvp(ctx, x_dot, kernel_dot, bias_dot, *_):
        qx, sx, qw, sw = ctx.saved_tensors
        y_dot = matmul(x_dot.astype(sx.dtype), qw * sw) + matmul(qx * sx, kernel_dot.astype(sw.dtype))
        return (y_dot if bias_dot is None else y_dot + bias_dot).astype(ctx.dtype)

    @staticmethod
    def surrogate(x, kernel, bias, key, rounding):
        def dequantised(a, axis):
            step = jnp.maximum(jnp.abs(a).max(axis, keepdims=True).astype(jnp.float32) / 127, 1e-30)
            return a + lax.stop_gradient(jnp.round(a / step) * step - a)

        return dequantised(x, 1) @ dequantised(kernel, 0) + (0 if bias is None else bias)

    @staticmethod
    def example(key, dtype):
        shapes = ((5, 3), (3, 4), (4,))
        return (*(jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)), None, "none")

    @staticmethod
    def examples(key, dtype):
        x, kernel, bias, _, rounding = Int8LinearFunction.example(key, dtype)
        return {
            "no bias": (x, kernel, None, None, rounding),
            "far out": (1e4 * x, kernel, None, None, rounding),
            "a row of zeros": (x.at[0].set(0), kernel, bias, None, rounding),
            "no rows": (x[:0], kernel, bias, None, rounding),
        }


def _quantized(a: jax.Array, axis: int, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Integers in [-127, 127] and the scale along `axis`, 0 where all is 0; rounded at random with a key."""
    a = a.astype(wide(a.dtype))
    scale = scale_to(127, jnp.abs(a).max(axis, keepdims=True, initial=0))
    u = a * safe_reciprocal(scale)
    u = jnp.round(u) if key is None else jnp.floor(u + jax.random.uniform(key, u.shape, u.dtype))
    return jnp.clip(u, -127, 127).astype(jnp.int8), scale


def _product(a: jax.Array, b: jax.Array, place: Any = None) -> jax.Array:
    """a b for int8 matrices, exact: int32, or a sum in float32 where one int32 could overflow; `place` is the sharding of the result, if known."""
    multiply = lambda a, b: matmul(a, b, preferred_element_type=jnp.int32, out_sharding=place)
    terms = a.shape[1]
    if is_symbolic_dim(terms):
        return matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if terms <= MOST_TERMS:
        return multiply(a, b)
    parts = range(0, terms, MOST_TERMS)
    return sum(multiply(a[:, i : i + MOST_TERMS], b[i : i + MOST_TERMS]).astype(jnp.float32) for i in parts)  # type: ignore[return-value]


def _gradient_product(g: jax.Array, q: jax.Array, rounding: str, key: jax.Array | None, place: Any = None) -> jax.Array:
    """g q, with the rows of g quantised."""
    if rounding == "none":
        return matmul(g, q.astype(g.dtype), out_sharding=place)
    qg, sg = _quantized(g, 1, key)
    return _product(qg, q, place).astype(g.dtype) * sg


def _swapped(sharding: NamedSharding) -> NamedSharding:
    """The sharding of the transpose of a matrix."""
    return NamedSharding(sharding.mesh, P(*reversed(sharding.spec)))


def _fold(key: jax.Array | None, n: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, n)


def int8_linear(
    x: Float[Array, "*batch in_features"],
    kernel: Float[Array, "in_features out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    gradient_rounding: str = "nearest",
    key: jax.Array | None = None,
) -> Float[Array, "*batch out_features"]:
    """Computes `x @ kernel + bias` in 8-bit integers, forward and backward.

    It saves memory for the backward pass, not time: the products are of 8-bit integers, summed in 32 bits, on every device, but what quantises their
    operands costs more than they save (`python -m layers bench int8_linear`). `fp8_linear` is for devices whose units multiply 8-bit floats.

    Each row of `x` and each column of `kernel` has a scale, its absolute maximum over 127; so have the rows and columns of the gradient that comes
    back. Backward keeps one byte for each entry of `x` and `kernel`, and neither of them itself.

    Args:
        x: any number of leading axes.
        kernel: Flax's layout.
        bias: is added in floating point; or None.
        gradient_rounding: "nearest"; "stochastic", at random, which needs `key`, and is right in the mean; "none" for floating-point products in
            backward.
        key: a key of `jax.random`.

    Returns:
        `(*batch, out_features)`, of the dtype of `x`. A row of zeros gives `bias`, and finite gradients.

    Raises:
        ValueError: where the shapes do not fit, `gradient_rounding` is unknown, or a key is missing or of no use.
        TypeError: where `x` or `kernel` is not of a floating-point dtype.

    Reference: Xi et al., "Jetfire: Efficient and Accurate Transformer Pretraining with INT8 Data Flow", 2024.
    """
    return _linear("int8_linear", x, kernel, bias, gradient_rounding, key)


def _linear(who: str, x: Any, kernel: Any, bias: Any, rounding: str, key: Any) -> jax.Array:
    x, kernel, bias = check_linear(who, x, kernel, bias)
    checks.choice(who, "gradient_rounding", rounding, ROUNDINGS)
    key = checks.key(who, "key", key, optional=True)
    if (rounding == "stochastic") != (key is not None):
        given = "no key is given" if key is None else "a key is given"
        raise ValueError(f"{who}: gradient_rounding is {rounding!r} and {given}; rounding at random, and only that, takes a key")
    y = Int8LinearFunction.apply(as_rows(x), kernel, bias, key, rounding)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


class Int8Linear(NarrowLinear):
    """`flax.nnx.Linear`, the same in constructor and parameters, by `int8_linear`.

    Args:
        gradient_rounding: as in `int8_linear`; "stochastic" takes a `key` in the call.

    Raises:
        ValueError: for a `precision`, `dot_general` or `preferred_element_type` of one's own: the products are of integers.
    """

    gradient_rounding = "nearest"

    @like_linear
    def __init__(self, *args: Any, gradient_rounding: str = "nearest", **options: Any):
        self._check_and_make(args, options)
        self.gradient_rounding = checks.choice("Int8Linear", "gradient_rounding", gradient_rounding, ROUNDINGS)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, key: jax.Array | None = None) -> jax.Array:
        return _linear("Int8Linear", *self._operands(inputs, out_sharding), self.gradient_rounding, key)
