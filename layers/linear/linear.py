"""The linear layer.

Forward   output = input weightᵀ + bias
Backward  grad_input = grad_output weight,   grad_weight = grad_outputᵀ input,   grad_bias = Σ grad_output

with the sum, and the contraction in grad_weight, over all leading axes.
Saved     input and weight, which are alive anyway, each only where the gradient of the other is wanted.

Reference: the example of `torch.autograd.Function` in PyTorch's documentation, "Extending PyTorch".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.core.function import Function
from layers.core.zeros import explicit_sharding


class LinearFunction(Function):
    """`apply(input, weight, bias=None)` with PyTorch's weight, `(out_features, in_features)`."""

    @staticmethod
    def forward(ctx, input, weight, bias=None):
        ctx.save_for_backward(input, weight, bias)
        output = input @ weight.T
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        leading = tuple(range(grad_output.ndim - 1))
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = jnp.tensordot(grad_output, input, (leading, leading), out_sharding=explicit_sharding(weight))
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(leading)
        return (grad_input, grad_weight, grad_bias)[: len(ctx.needs_input_grad)]

    @staticmethod
    def example(key, dtype):
        keys = jax.random.split(key, 3)
        return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, ((5, 3), (4, 3), (4,)), strict=True))


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
        ValueError: where the shapes do not fit.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"linear: kernel has shape {kernel.shape}, but must be (in_features, out_features) with in_features the last axis of x (x: {x.shape})"
        )
    if bias is None:
        return LinearFunction.apply(x, kernel.T)
    if jnp.shape(bias) != kernel.shape[1:]:
        raise ValueError(f"linear: bias has shape {jnp.shape(bias)}, but must have shape {kernel.shape[1:]} (kernel: {kernel.shape})")
    return LinearFunction.apply(x, kernel.T, jnp.asarray(bias))


class Linear(nnx.Linear):
    """`flax.nnx.Linear`, the same in constructor, parameters and values, by `linear`.

    A `dot_general`, `precision` or `preferred_element_type` of one's own, and `out_sharding` in the call, are served by Flax's code.
    """

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        own = self.dot_general is not jax.lax.dot_general or self.precision is not None or self.preferred_element_type is not None
        if own or out_sharding is not None:
            return super().__call__(inputs, out_sharding=out_sharding)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return linear(inputs, kernel, bias)
