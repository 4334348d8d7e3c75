"""A causal convolution of a few steps, for each feature by itself, and an activation.

    a_t = Σ_i kernel_i x_{t-width+1+i} + bias,   out_t = f(a_t)

Backward  da_t = f'(a_t) dout_t,   dx_s = Σ_i kernel_i da_{s+width-1-i},   dkernel_i = Σ_t x_{t-width+1+i} da_t,   dbias = Σ_t da_t

Steps before the first one are those of the state, (batch, width - 1, features): the last inputs of the part of the sequence before. A step of
another packed sequence has no share in a_t.

Both ways go through chunks of time, so that nothing else of the size of x is there at once. Backward computes a again, from the last chunk to the
first; what a chunk has for the gradient of the `width - 1` steps before it is carried on.

Saved: the arguments.

Reference: the convolution of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.elementwise import ACTIVATIONS
from layers.core.machine import UNLIMITED, choose, platform
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.sharding import sharded_as
from layers.function.function import Function
from layers.recurrent.chunks import cut_rows, put_rows
from layers.recurrent.gates import visible
from layers.recurrent.loops import fold_chunks
from layers.recurrent.segments import check_segment_ids, runs_of

CHUNK = 64
"""Steps that are taken together on a CPU."""


class ShortConvolutionFunction(Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, initial, runs, activation, chunk):
        ctx.save_for_backward(x, kernel, bias, initial, runs)
        ctx.activation, ctx.chunk = activation, chunk

        def step(out, start, size, _):
            a = _convolved(*_window(x, initial, runs, start, size, len(kernel)), kernel, bias)
            return put_rows(out, a if activation is None else ACTIVATIONS[activation].value(a), start), None

        out, _ = fold_chunks(step, sharded_as(jnp.zeros_like(x), x), x.shape[1], chunk, beside=(x, kernel, bias, initial, runs))
        return out, _state(x, initial, runs, len(kernel))

    @staticmethod
    def backward(ctx, dout, dstate):
        (x, kernel, bias, initial, runs), (dout, dstate) = barrier(ctx.saved_tensors, (dout, dstate))
        dtype, before = wide(x.dtype), len(kernel) - 1

        def step(carry, start, size, _):
            dbefore, dkernel, dbias, dx = carry
            window, together = _window(x, initial, runs, start, size, len(kernel))
            da = cut_rows(dout, start, size, dtype)
            if ctx.activation is not None:
                da = _kept_narrow(ACTIVATIONS[ctx.activation].pull(_convolved(window, together, kernel, bias), da), x.dtype)
            dwindow = jnp.pad(dbefore, ((0, 0), (size, 0), (0, 0)))
            for i, keep in enumerate(together):
                dwindow = dwindow + jnp.pad(visible(da, keep) * kernel[i].astype(dtype), ((0, 0), (i, before - i), (0, 0)))
            dkernel = dkernel + jnp.stack([(_seen(window, i, keep, size) * da).sum((0, 1)) for i, keep in enumerate(together)])
            return (dwindow[:, :before], dkernel, dbias + da.sum((0, 1)), put_rows(dx, dwindow[:, before:], start)), None

        dlast = visible(dstate, _of_last(runs, len(kernel))).astype(dtype)
        carry = dlast, jnp.zeros(kernel.shape, dtype), jnp.zeros(kernel.shape[1:], dtype), sharded_as(jnp.zeros_like(x), x)
        beside = x, kernel, bias, initial, runs, dout
        (dinitial, dkernel, dbias, dx), _ = fold_chunks(step, carry, x.shape[1], ctx.chunk, reverse=True, beside=beside)
        return dx, dkernel, None if bias is None else dbias, None if initial is None else dinitial, None, None, None

    @staticmethod
    def example(key, dtype):
        shapes = (1, 5, 3), (3, 3), (3,), (1, 2, 3)
        arrays = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 4), shapes, strict=True))
        return *arrays, jnp.array([[0, 0, 0, 1, 1]]), "silu", 2

    @staticmethod
    def examples(key, dtype):
        x, kernel, bias, initial, runs, activation, chunk = ShortConvolutionFunction.example(key, dtype)
        return {
            "plain": (x, kernel, None, None, None, None, chunk),
            "far out": (1e4 * x, kernel, None, None, None, None, chunk),
            "no activation": (x, kernel, bias, initial, runs, None, chunk),
            "shorter than the kernel": (x[:, :1], kernel, bias, initial, runs[:, :1], activation, chunk),
            "no steps": (x[:, :0], kernel, bias, initial, None, activation, chunk),
        }


def _window(x: jax.Array, initial: Any, runs: Any, start: Any, size: int, width: int) -> tuple[jax.Array, list[Any]]:
    """Some steps and those before them, (batch, width - 1 + size, features), wide; for each weight whether the step that it multiplies is of the
    sequence of the output, (batch, size, 1), or None where all are."""
    window = jnp.concatenate([_before(x, initial, start, width), lax.dynamic_slice_in_dim(x, start, size, 1)], 1).astype(wide(x.dtype))
    if runs is None:
        return window, [None] * width
    runs = jnp.concatenate([_before(runs, None, start, width), lax.dynamic_slice_in_dim(runs, start, size, 1)], 1)[..., None]
    return window, [runs[:, i : i + size] == runs[:, width - 1 :] for i in range(width)]


def _before(x: jax.Array, initial: Any, start: Any, width: int) -> jax.Array:
    """The `width - 1` steps before `start`, which is 0 or at least as many: `initial`, or zeros, before the first one."""
    shape = (x.shape[0], width - 1, *x.shape[2:])
    first = sharded_as(jnp.zeros(shape, x.dtype), x) if initial is None else initial.astype(x.dtype)
    if isinstance(start, int) and start == 0:
        return first
    return jnp.where(start == 0, first, lax.dynamic_slice_in_dim(x, jnp.maximum(start - width + 1, 0), width - 1, 1))


def _kept_narrow(da: jax.Array, dtype: Any) -> jax.Array:
    """da, which several sums read: on a GPU, where it is there for all steps at once, it is kept in the dtype of x, in the place of dx."""
    return barrier((), da.astype(dtype))[1].astype(da.dtype) if platform() in ("cuda", "rocm") else da


def _seen(window: jax.Array, i: int, keep: Any, size: int) -> jax.Array:
    """What the weight `i` multiplies at each step."""
    return visible(window[:, i : i + size], keep)


def _convolved(window: jax.Array, together: list[Any], kernel: jax.Array, bias: Any) -> jax.Array:
    """a, as sums of shifted products, which XLA fuses."""
    size = window.shape[1] - len(kernel) + 1
    terms = (_seen(window, i, keep, size) * kernel[i].astype(window.dtype) for i, keep in enumerate(together))
    return functools.reduce(jnp.add, terms) + (0 if bias is None else bias.astype(window.dtype))


def _state(x: jax.Array, initial: Any, runs: Any, width: int) -> jax.Array:
    """The last `width - 1` inputs, zeros for those of another sequence than the last one."""
    rows = jnp.concatenate([_before(x, initial, 0, width), x[:, max(x.shape[1] - width + 1, 0) :]], 1)
    return visible(rows[:, rows.shape[1] - width + 1 :], _of_last(runs, width))


def _of_last(runs: Any, width: int) -> Any:
    """Which of the last `width - 1` inputs are of the last sequence, (batch, width - 1, 1); None where all are."""
    if runs is None:
        return None
    rows = _state(runs, None, None, width)
    return (rows == rows[:, -1:])[..., None]


def short_convolution(
    x: Float[Array, "batch time features"],
    kernel: Float[Array, "width features"],
    bias: Float[Array, " features"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "batch width-1 features"] | None = None,
    return_state: bool = False,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Any:
    """Convolves each feature with a few weights of its own over its last steps, and applies an activation.

    Args:
        x: inputs.
        kernel: the weights, the last one for the step itself. Flax's causal depthwise `Conv` has it as (width, 1, features).
        bias: is added; None for none.
        activation: "silu" or another of those of `mlp`; None for none.
        initial_state: the inputs before the first one; None for zeros.
        return_state: whether to return the last `width - 1` inputs too, the state for the part of the sequence after.
        segment_ids: packed sequences: where the id changes from one step to the next, nothing before is seen; the first sequence goes on from
            `initial_state`.

    Returns:
        An array of the shape and dtype of `x`; with `return_state` also the state, (batch, width - 1, features), zeros where the last sequence is
        shorter.

    Raises:
        ValueError: where shapes do not fit, or for an unknown activation.
        TypeError: where an argument is not of a real floating-point dtype, or `segment_ids` not of integers.

    Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """
    who = "short_convolution"
    x, kernel = checks.array(who, "x", x), checks.array(who, "kernel", kernel)
    bias, initial = (checks.array(who, what, v, optional=True) for what, v in (("bias", bias), ("initial_state", initial_state)))
    if x.ndim != 3:
        raise ValueError(f"{who}: x has shape {x.shape}, but must be (batch, time, features); use jax.vmap for further axes")
    batch, _, features = x.shape
    if kernel.ndim != 2 or not kernel.shape[0]:
        raise ValueError(f"{who}: kernel has shape {kernel.shape}, but must be (width, features), with a weight for the step itself")
    width = len(kernel)
    checks.shape(who, "kernel", kernel, (width, features), "(width, features)", x=x)
    checks.shape(who, "bias", bias, (features,), "(features,)", x=x)
    checks.shape(who, "initial_state", initial, (batch, width - 1, features), "(batch, width - 1, features)", x=x, kernel=kernel)
    activation = checks.choice(who, "activation", activation, (None, *ACTIVATIONS))
    keep = checks.flag(who, "return_state", return_state)
    runs = runs_of(check_segment_ids(who, segment_ids, x.shape[:2], "(batch, time)", x=x))
    out, state = ShortConvolutionFunction.apply(x, kernel, bias, initial, runs, activation, max(choose(CHUNK, UNLIMITED), width))
    return (out, state) if keep else out
