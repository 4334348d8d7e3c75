"""Functions that are hard on `Function`, each with the same mathematics in plain JAX. After PyTorch's own test suite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.function.function import Function


class Linear(Function):
    """PyTorch's first example: a layer with an optional bias that honours `needs_input_grad`."""

    @staticmethod
    def forward(ctx, input, weight, bias=None):
        ctx.save_for_backward(input, weight, bias)
        output = input @ weight.T
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = grad_output.T @ input
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_input, grad_weight, grad_bias


class Sort(Function):
    """Two outputs, the second of integers."""

    @staticmethod
    def forward(ctx, x):
        order = jnp.argsort(x, axis=0)
        ctx.mark_non_differentiable(order)
        ctx.save_for_backward(order)
        return jnp.take_along_axis(x, order, axis=0), order

    @staticmethod
    def backward(ctx, grad_sorted, _grad_order):
        (order,) = ctx.saved_tensors
        return jnp.take_along_axis(grad_sorted, jnp.argsort(order, axis=0), axis=0)


class Mul(Function):
    """Saves only what the wanted gradients need: the number of residuals depends on `needs_input_grad`."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, y if ctx.needs_input_grad[0] else None)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y if ctx.needs_input_grad[0] else None, grad * x if ctx.needs_input_grad[1] else None


class Cube(Function):
    """The intermediate that backward uses is a second output, so that its own derivative is known."""

    @staticmethod
    def forward(ctx, x):
        dx = 3 * x**2
        ctx.save_for_backward(x, dx)
        return x**3, dx

    @staticmethod
    def backward(ctx, grad, grad_dx):
        x, dx = ctx.saved_tensors
        return grad * dx + grad_dx * 6 * x


class Unchanged(Function):
    """Returns its input."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class NoArrays(Function):
    """Nothing to differentiate."""

    @staticmethod
    def forward(ctx, size, kind):
        return jnp.ones(size) if kind == "ones" else jnp.zeros(size)

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Gaps(Function):
    """`None` gradients in the middle and at the end."""

    @staticmethod
    def forward(ctx, x, power, y, index, z, mode, flag):
        ctx.save_for_backward(x, y, z, index)
        ctx.power, ctx.flag = power, flag
        assert mode == "sum"
        return x**power + y[index] * z if flag else x**power

    @staticmethod
    def backward(ctx, grad):
        x, y, z, index = ctx.saved_tensors
        dx = grad * ctx.power * x ** (ctx.power - 1)
        if not ctx.flag:
            return dx, None, None, None, None, None, None
        return dx, None, jnp.zeros_like(y).at[index].add(grad * z), None, grad * y[index], None, None


class Tree(Function):
    """Pytrees in and out."""

    @staticmethod
    def forward(ctx, params, inputs):
        first, (second, _) = inputs
        ctx.save_for_backward(params, inputs)
        return {"affine": first * params["scale"] + params["shift"], "rest": (second * first, None)}

    @staticmethod
    def backward(ctx, grads):
        params, (first, (second, _)) = ctx.saved_tensors
        da, (dr, _) = grads["affine"], grads["rest"]
        return {"scale": da * first, "shift": da}, (da * params["scale"] + dr * second, (dr * first, None))


class Noise(Function):
    """A typed PRNG key, a Python number and a flag; the mask is drawn again in backward."""

    @staticmethod
    def forward(ctx, x, key, rate, train=True):
        ctx.save_for_backward(key)
        ctx.rate, ctx.train, ctx.shape = rate, train, x.shape
        return x * _mask(key, rate, x.shape) if train else x

    @staticmethod
    def backward(ctx, grad):
        (key,) = ctx.saved_tensors
        return grad * _mask(key, ctx.rate, ctx.shape) if ctx.train else grad, None, None, None


def _mask(key, rate, shape):
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


class Masked(Function):
    """A boolean array and boolean options."""

    @staticmethod
    def forward(ctx, x, mask, *, negate=False, scale=2.0):
        mask = ~mask if negate else mask
        ctx.mask, ctx.scale = mask, scale
        return jnp.where(mask, x * scale, 0)

    @staticmethod
    def backward(ctx, grad):
        return jnp.where(ctx.mask, grad * ctx.scale, 0), None


class Options(Function):
    """A callable and an unhashable option."""

    @staticmethod
    def forward(ctx, x, fn, options):
        ctx.fn, ctx.options = fn, options
        ctx.save_for_backward(x)
        return options["gain"] * fn(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return ctx.options["gain"] * jax.vjp(ctx.fn, x)[1](grad)[0], None, None


class Split(Function):
    """The split form; saves an output."""

    @staticmethod
    def forward(x, scale=2.0):
        return jnp.tanh(scale * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.scale = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * ctx.scale * (1 - y * y), None


class Wrong(Function):
    """`sin` with a gradient that is three times too large, so that one sees where it is used."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return jnp.sin(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * jnp.cos(x)


class ScaledShare(Function):
    """Two arguments and two outputs, the second of which does not depend on the first argument."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w, 2 * w

    @staticmethod
    def backward(ctx, dy, dz):
        x, w = ctx.saved_tensors
        return dy * w, dy * x + 2 * dz


@dataclass(frozen=True)
class Case:
    """A Function and its plain twin, both as `fn(*arrays)`, at `arrays`."""

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    arrays: tuple[Any, ...]

    def __repr__(self) -> str:
        return self.name


def floats(*shape: int, seed: int = 0) -> jax.Array:
    """Distinct values of both signs, none of them near zero."""
    values = np.sin(1.7 * (np.arange(math.prod(shape)) + 1) + seed)
    return jnp.asarray((values + 0.3 * np.sign(values)).reshape(shape), jnp.float32)


_INDEX = jnp.array([2, 0, 2, 1])
_MASK = jnp.array([True, False, True, True])
_KEY = jax.random.key(7)
_WEIGHTS = {"gain": 1.5, "unused": [1, 2]}


def _tree_reference(scale, shift, first, second):
    return {"affine": first * scale + shift, "rest": (second * first, None)}


CASES = [
    Case("linear", Linear.apply, lambda x, w, b: x @ w.T + b, (floats(4, 3), floats(2, 3, seed=1), floats(2, seed=2))),
    Case("linear without bias", lambda x, w: Linear.apply(x, w), lambda x, w: x @ w.T, (floats(4, 3), floats(2, 3, seed=1))),
    Case("sort", lambda x: Sort.apply(x)[0], lambda x: jnp.sort(x, axis=0), (floats(4, 2),)),
    Case("mul", Mul.apply, lambda x, y: x * y, (floats(4), floats(4, seed=1))),
    Case("cube", Cube.apply, lambda x: (x**3, 3 * x**2), (floats(4),)),
    Case("unchanged", Unchanged.apply, lambda x: x, (floats(4),)),
    Case(
        "gaps",
        lambda x, y, z: Gaps.apply(x, 3, y, _INDEX, z, "sum", True),
        lambda x, y, z: x**3 + y[_INDEX] * z,
        (floats(4), floats(3, seed=1), floats(4, seed=2)),
    ),
    Case(
        "tree",
        lambda a, b, c, d: Tree.apply({"scale": a, "shift": b}, (c, (d, None))),
        _tree_reference,
        (floats(4), floats(4, seed=1), floats(4, seed=2), floats(4, seed=3)),
    ),
    Case("noise", lambda x: Noise.apply(x, _KEY, 0.5), lambda x: x * _mask(_KEY, 0.5, x.shape), (floats(4),)),
    Case("masked", lambda x: Masked.apply(x, _MASK, negate=True), lambda x: jnp.where(~_MASK, 2 * x, 0), (floats(4),)),
    Case("options", lambda x: Options.apply(x, jnp.tanh, _WEIGHTS), lambda x: 1.5 * jnp.tanh(x), (floats(4),)),
    Case("split", Split.apply, lambda x: jnp.tanh(2.0 * x), (floats(4),)),
]
