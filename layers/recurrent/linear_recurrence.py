"""A linear recurrence with time-varying diagonal coefficients.

Forward   h_t = a_t h_{t-1} + b_t,   h_0 = initial state
Backward  l_t = dh_t + a_{t+1} l_{t+1},   db_t = l_t,   da_t = l_t h_{t-1},   d(initial) = a_1 l_1

Each h_t reaches the loss directly and through h_{t+1} = a_{t+1} h_t + ..., which gives l_t, the gradient of h_t in all; b_t and a_t enter h_t with
the factors 1 and h_{t-1}. It is the same recurrence, run backwards.

Saved     a, h and the initial state: h is the output, so a alone is extra where it is no argument.

Reference: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, section 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from layers.core.function import Function
from layers.recurrent.recurrence import before, run, run_back


class LinearRecurrenceFunction(Function):
    @staticmethod
    def forward(ctx, a, b, initial):
        h = run(a, b, initial)
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h, initial = ctx.saved_tensors
        db, dinitial = run_back(a, dh)
        return db * before(initial, h), db, dinitial.astype(initial.dtype)

    @staticmethod
    def jvp(ctx, da, db, dinitial):
        a, h, initial = ctx.saved_tensors
        return LinearRecurrenceFunction.apply(a, da * before(initial, h) + db, dinitial)

    @staticmethod
    def example(key, dtype):
        a, b, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), ((5, 3), (5, 3), (3,)), strict=True))
        return 0.5 * a, b, initial


def linear_recurrence(
    a: Inexact[Array, "*shape"],
    b: Inexact[Array, "*shape"],
    initial: Inexact[Array, "..."] | None = None,
    *,
    axis: int = 0,
    reverse: bool = False,
) -> Inexact[Array, "*shape"]:
    """Computes h_t = a_t h_{t-1} + b_t for every t along `axis`, elementwise in all other axes.

    The state is held in float32 or wider, whatever the dtype of the arrays. On a CPU the steps run one after the other; on an accelerator they are
    composed in pairs, pairs of pairs and so on, where products of coefficients must stay finite unless what they multiply is 0.

    Args:
        a: coefficients, real or complex.
        b: inputs, of the same shape.
        initial: the state before the first step, of that shape without `axis`; zeros by default.
        axis: the time axis.
        reverse: runs from the last step to the first.

    Returns:
        Every state, of the shape of `a` and the dtype that `a`, `b` and `initial` promote to.

    Raises:
        ValueError: where shapes differ or `axis` is not an axis.
        TypeError: for arrays of integers.

    Reference: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if not jnp.issubdtype(jnp.result_type(a, b), jnp.inexact):
        raise TypeError(f"linear_recurrence: a and b are of dtype {a.dtype} and {b.dtype}, but must be floating-point or complex: cast them")
    if a.shape != b.shape:
        raise ValueError(f"linear_recurrence: a has shape {a.shape}, but must have that of b, {b.shape}; broadcast it")
    if not -a.ndim <= axis < a.ndim:
        raise ValueError(f"linear_recurrence: axis is {axis}, but a has shape {a.shape}")
    a, b = jnp.moveaxis(a, axis, 0), jnp.moveaxis(b, axis, 0)
    if initial is not None and jnp.shape(initial) != a.shape[1:]:
        raise ValueError(f"linear_recurrence: initial has shape {jnp.shape(initial)}, but must have shape {a.shape[1:]}, one step of a")
    dtype = jnp.result_type(a, b, *(() if initial is None else (initial,)))
    start = jnp.zeros_like(b[0] if len(b) else b, dtype, shape=a.shape[1:]) if initial is None else jnp.asarray(initial, dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    if not a.shape[0]:
        return jnp.moveaxis(b, 0, axis)
    flip = (lambda x: jnp.flip(x, 0)) if reverse else (lambda x: x)
    return jnp.moveaxis(flip(LinearRecurrenceFunction.apply(flip(a), flip(b), start)), 0, axis)
