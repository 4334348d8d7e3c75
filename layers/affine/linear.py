"""The linear layer.

Forward   output = input weightᵀ + bias
Backward  grad_input = grad_output weight,   grad_weight = grad_outputᵀ input,   grad_bias = Σ grad_output

with the sum, and the contraction in grad_weight, over all leading axes. Flax's kernel is weightᵀ: each product contracts the other of its axes, so
that what is given is never transposed, which would be one more array to keep.

Saved     input and weight, which are alive anyway, each only where the gradient of the other is wanted; the input in the dtype of the products where
          that is narrower, the weight always as it is given.

Reference: the example of `torch.autograd.Function` in PyTorch's documentation, "Extending PyTorch".
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.products import products_are_patched
from layers.core.recompute import barrier
from layers.core.sharding import explicit_sharding
from layers.function.function import Function


class LinearFunction(Function):
    """`apply(input, weight, bias=None)` with PyTorch's weight, `(out_features, in_features)`.

    `out_axis=1` takes Flax's kernel, `(in_features, out_features)`; `dtype` is that of the products, by default the common one.
    """

    @staticmethod
    def forward(ctx, input, weight, bias=None, out_axis=0, dtype=None):
        given = [a for a in (input, weight, bias) if a is not None]
        dtype = jnp.dtype(dtype or jnp.result_type(*given))
        x = input.astype(dtype)
        ctx.save_for_backward(x if dtype.itemsize < input.dtype.itemsize else input, weight)
        ctx.out_axis, ctx.is_real = out_axis, [not jnp.iscomplexobj(a) for a in given]
        output = _contract(x, weight.astype(dtype), (x.ndim - 1,), (1 - out_axis,))
        return output if bias is None else output + bias.astype(dtype)

    @staticmethod
    def backward(ctx, grad_output):
        saved, dtype = ctx.saved_tensors, grad_output.dtype
        if any(a.dtype != dtype for a in saved):  # or XLA would keep the cast of forward
            saved, grad_output = barrier(saved, grad_output)
        input, weight = (a.astype(dtype) for a in saved)
        leading = tuple(range(grad_output.ndim - 1))
        grads: list[Any] = [None] * len(ctx.is_real)
        if ctx.needs_input_grad[0]:
            grads[0] = _contract(grad_output, weight, (grad_output.ndim - 1,), (ctx.out_axis,))
        if ctx.needs_input_grad[1]:
            pair = (grad_output, input) if ctx.out_axis == 0 else (input, grad_output)
            grads[1] = _contract(*pair, leading, leading, explicit_sharding(weight))
        if len(grads) > 2 and ctx.needs_input_grad[2]:
            grads[2] = grad_output.sum(leading)
        grads = [g.real if g is not None and real else g for g, real in zip(grads, ctx.is_real, strict=True)]
        return *grads, *[None] * (5 - len(grads))

    @staticmethod
    def example(key, dtype):
        keys = jax.random.split(key, 3)
        return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, ((5, 3), (4, 3), (4,)), strict=True))

    @staticmethod
    def examples(key, dtype):
        x, weight, bias = LinearFunction.example(key, dtype)
        return {
            "no bias": (x, weight, None),
            "Flax's kernel, products in float64": (x, weight.T, bias, 1, jnp.float64),
            "far out": (1e4 * x, weight, bias),
            "one vector": (x[0], weight, bias),
            "no rows": (x[:0], weight, bias),
        }


def _contract(x: jax.Array, y: jax.Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...], out_sharding: Any = None) -> jax.Array:
    return lax.dot_general(x, y, ((x_axes, y_axes), ((), ())), out_sharding=out_sharding)


def linear(
    x: Float[Array, "*batch in_features"],
    kernel: Float[Array, "in_features out_features"],
    bias: Float[Array, " out_features"] | None = None,
) -> Float[Array, "*batch out_features"]:
    """Computes `x @ kernel + bias`.

    Args:
        x: any number of leading axes.
        kernel: Flax's layout, `(in_features, out_features)`.
        bias: `(out_features,)`, or None.

    Returns:
        `(*batch, out_features)`.

    Raises:
        TypeError: where an argument is no array of numbers, or a parameter not of a floating-point or complex dtype.
        ValueError: where the shapes do not fit.
    """
    x, kernel = checks.array("linear", "x", x, "number"), checks.array("linear", "kernel", kernel, "inexact", ndim=2)
    bias = checks.array("linear", "bias", bias, "inexact", optional=True)
    if x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"linear: kernel has shape {kernel.shape}, but must be (in_features, out_features) with in_features the last axis of x (x: {x.shape})"
        )
    checks.shape("linear", "bias", bias, kernel.shape[1:], "(out_features,)", kernel=kernel)
    return LinearFunction.apply(x, kernel, *(() if bias is None else (bias,)), out_axis=1)


class Linear(nnx.Linear):
    """`flax.nnx.Linear`, the same in constructor, parameters and values, by `linear`.

    A `dot_general`, `precision` or `preferred_element_type` of one's own, and `out_sharding` in the call, are served by Flax's code.
    """

    @functools.wraps(nnx.Linear.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        given = checks.arguments("Linear", super().__init__, args, kwargs)
        for what in ("in_features", "out_features"):
            given[what] = checks.integer("Linear", what, given[what], "[1, 2147483647]")
        given["use_bias"] = checks.flag("Linear", "use_bias", given["use_bias"])
        checks.dtype("Linear", "dtype", given["dtype"], "inexact")
        checks.dtype("Linear", "param_dtype", given["param_dtype"], "inexact", optional=False)
        super().__init__(**given)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        if not products_are_patched():  # which may stand for arrays of their own
            inputs = self._checked(inputs)
        own = self.dot_general is not lax.dot_general or self.precision is not None or self.preferred_element_type is not None
        if own or out_sharding is not None or products_are_patched():
            return super().__call__(inputs, out_sharding=out_sharding)
        arrays = inputs, self.kernel[...], None if self.bias is None else self.bias[...]
        if self.promote_dtype is not dtypes.promote_dtype:
            arrays = self.promote_dtype(arrays, dtype=self.dtype)
        dtype = dtypes.canonicalize_dtype(*arrays, dtype=self.dtype)
        return LinearFunction.apply(*arrays, out_axis=1, dtype=dtype)

    def _checked(self, inputs: Any) -> jax.Array:
        x = checks.array("Linear", "inputs", inputs, "any")
        if x.ndim < 1 or x.shape[-1] != self.kernel.shape[0]:  # modules derived from this one for Linen have no in_features
            raise ValueError(f"Linear: inputs has shape {x.shape}, but must be (..., in_features) with in_features = {self.kernel.shape[0]}")
        return x
