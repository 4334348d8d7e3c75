"""A linear recurrence with time-varying diagonal coefficients.

Forward   h_t = a_t h_{t-1} + b_t,   h_0 = initial state
Backward  l_t = dh_t + a_{t+1} l_{t+1},   db_t = l_t,   da_t = l_t h_{t-1},   d(initial) = a_1 l_1

Each h_t reaches the loss directly and through h_{t+1} = a_{t+1} h_t + ..., which gives l_t, the gradient of h_t in all; b_t and a_t enter h_t with
the factors 1 and h_{t-1}. It is the same recurrence, run backwards. Where a packed sequence starts, h_{t-1} is 0 in all of this.

Saved     a, h and the initial state: h is the output, so a alone is extra where it is no argument.

Reference: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, section 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from layers.core import checks
from layers.function.function import Function
from layers.recurrent.recurrence import before, run, run_back
from layers.recurrent.segments import resets_of, restart


class LinearRecurrenceFunction(Function):
    @staticmethod
    def forward(ctx, a, b, initial, resets):
        h = run(a, b, initial, resets)
        ctx.save_for_backward(a, h, initial, resets)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h, initial, resets = ctx.saved_tensors
        db, dinitial = run_back(a, dh, None, resets)
        return restart(resets, db * before(initial, h)), db, dinitial.astype(initial.dtype), None

    @staticmethod
    def jvp(ctx, da, db, dinitial, _resets):
        a, h, initial, resets = ctx.saved_tensors
        return LinearRecurrenceFunction.apply(a, restart(resets, da * before(initial, h)) + db, dinitial, resets)

    @staticmethod
    def example(key, dtype):
        a, b, initial = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), ((5, 3), (5, 3), (3,)), strict=True))
        return 0.5 * a, b, initial, jnp.array([False, False, True, False, True])[:, None]

    @staticmethod
    def examples(key, dtype):
        a, b, initial, resets = LinearRecurrenceFunction.example(key, dtype)
        return {
            "no resets": (a, b, initial, None),
            "far out": (a, 1e4 * b, initial, None),
            "forgets all": (0 * a, b, initial, resets),
            "one step": (a[:1], b[:1], initial, resets[:1]),
        }


def linear_recurrence(
    a: Inexact[Array, "*shape"],
    b: Inexact[Array, "*shape"],
    initial: Inexact[Array, "..."] | None = None,
    *,
    axis: int = 0,
    reverse: bool = False,
    segment_ids: Int[Array, "..."] | None = None,
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
        segment_ids: integers, packed sequences: where the id changes from one step to the next, the state starts again from 0; the first sequence
            starts from `initial`. Of the shape of `a`, or of its first axes up to the time axis or one after it: (batch, time) for `a` of
            (batch, time, features) and axis 1.

    Returns:
        Every state, of the shape of `a` and the dtype that `a`, `b` and `initial` promote to.

    Raises:
        ValueError: where shapes differ or `axis` is not an axis.
        TypeError: for arrays of integers, or `segment_ids` that are not.

    Reference: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018.
    """
    who = "linear_recurrence"
    a, b = (checks.array(who, what, x, "number") for what, x in (("a", a), ("b", b)))
    initial = checks.array(who, "initial", initial, "number", optional=True)
    if not jnp.issubdtype(jnp.result_type(a, b), jnp.inexact):
        raise TypeError(f"{who}: a and b are of dtype {a.dtype} and {b.dtype}, but must be floating-point or complex: cast them")
    checks.shape(who, "a", a, b.shape, "the shape of b", ": broadcast it")
    axis, reverse = checks.axis(who, "axis", axis, a.ndim), checks.flag(who, "reverse", reverse)
    checks.shape(who, "initial", initial, (*a.shape[:axis], *a.shape[axis + 1 :]), "one step of a", a=a)
    resets = _resets(segment_ids, a.shape, axis, reverse)
    a, b = jnp.moveaxis(a, axis, 0), jnp.moveaxis(b, axis, 0)
    dtype = jnp.result_type(a, b, *(() if initial is None else (initial,)))
    start = jnp.zeros_like(b[0] if len(b) else b, dtype, shape=a.shape[1:]) if initial is None else initial.astype(dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    if not a.shape[0]:
        return jnp.moveaxis(b, 0, axis)
    flip = (lambda x: jnp.flip(x, 0)) if reverse else (lambda x: x)
    return jnp.moveaxis(flip(LinearRecurrenceFunction.apply(flip(a), flip(b), start, None if resets is None else flip(resets))), 0, axis)


def _resets(ids: Any, shape: tuple[int, ...], axis: int, reverse: bool) -> Any:
    """Where sequences start, time first, with an axis for each of `shape`; None where there are no ids."""
    ids = checks.array("linear_recurrence", "segment_ids", ids, "integer", optional=True)
    if ids is None:
        return None
    if not axis < ids.ndim or ids.shape != shape[: ids.ndim]:
        raise ValueError(f"linear_recurrence: segment_ids has shape {ids.shape}, but must have that of a, or of its first axes with time: {shape}")
    return jnp.moveaxis(resets_of(ids, axis, reverse=reverse).reshape(*ids.shape, *(1 for _ in shape[ids.ndim :])), axis, 0)
