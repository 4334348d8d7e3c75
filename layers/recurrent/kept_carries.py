"""A scan that keeps the carry before each step and nothing else, and computes each step again in backward.

    c_t, y_t = f(c_{t-1}, x_t)

Backward goes through the steps from the last to the first, makes each one's pullback from its carry, and with θ for what f closes over

    dc_{t-1}, dx_t, dθ_t = pull_t(dc_t, dy_t),   dθ = Σ_t dθ_t

The sum is carried, in float32 or wider, so nothing of the size of θ is stacked. A step may itself be a scan over a segment of steps
(`checkpointed_scan.py`): then this is what keeps the carries at the starts of segments.

Saved: the carries, and the xs and θ, which are arguments.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr

from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.trees import is_inexact
from layers.function.function import Function
from layers.recurrent.loops import scan

Step = Callable[..., tuple[Any, Any]]
Leaves = list[Any]


@dataclass(frozen=True, eq=False)
class Body:
    """One step as a function of flat lists of arrays that closes over none of them.

    Attributes:
        call: `(consts, carry, x) -> (carry, y)`.
        consts: how many arrays `consts` has.
        carry: how many arrays the carry has.
    """

    call: Callable[[Leaves, Leaves, Leaves], tuple[Leaves, Leaves]]
    consts: int
    carry: int

    def split(self, arrays: Sequence[Any]) -> tuple[Leaves, Leaves, Leaves]:
        """Consts, carry and x, of a list of all of them or of one flag for each."""
        end = self.consts + self.carry
        return list(arrays[: self.consts]), list(arrays[self.consts : end]), list(arrays[end:])


class CheckpointedScanFunction(Function):
    @staticmethod
    def forward(ctx, body, reverse, *arrays):
        consts, init, xs = body.split([x if isinstance(x, jax.Array) else jnp.asarray(x) for x in arrays])
        ctx.body, ctx.reverse = body, reverse
        if not any(ctx.needs_input_grad):
            last, ys = scan(partial(body.call, consts), init, xs, reverse=reverse, beside=consts)
            return (*last, *ys)

        def keeping(carry: Leaves, x: Leaves) -> tuple[Leaves, tuple[Leaves, Leaves]]:
            new, y = body.call(consts, carry, x)
            return new, (carry, y)

        last, (carries, ys) = scan(keeping, init, xs, reverse=reverse, beside=consts)
        ctx.save_for_backward(consts, carries, xs)
        return (*last, *ys)

    @staticmethod
    def backward(ctx, *cotangents):
        body: Body = ctx.body
        (consts, carries, xs), cotangents = barrier(ctx.saved_tensors, cotangents)
        wants_const, _, wants_x = body.split(ctx.needs_input_grad[2:])
        differentiated = [*wants_const, *(is_inexact(c) for c in carries), *wants_x]
        dlast = [d for d in cotangents[: body.carry] if d is not None and is_inexact(d)]
        dys = [d for d in cotangents[body.carry :] if d is not None and is_inexact(d)]

        def step(carry, row):
            dcarry, sums = carry
            kept, x, dy = row
            pull = _pull_of(body, (*consts, *kept, *x), differentiated)
            dconsts, dcarry, dx = _parts(body, differentiated, pull([*dcarry, *dy]))
            return (dcarry, [s + d.astype(s.dtype) for s, d in zip(sums, dconsts, strict=True)]), dx

        zeros = [jnp.zeros(c.shape, wide(c.dtype)) for c, w in zip(consts, wants_const, strict=True) if w]
        (dinit, dconsts), dxs = scan(step, (dlast, zeros), (carries, xs, dys), reverse=not ctx.reverse, beside=consts)
        grads = iter([*dconsts, *dinit, *dxs])
        return None, None, *(next(grads) if m else None for m in differentiated)

    @staticmethod
    def jvp(ctx, _body, _reverse, *tangents):
        consts, carries, xs = ctx.saved_tensors
        init = [c[-1 if ctx.reverse else 0] for c in carries]
        arrays = (*consts, *init, *xs)
        differentiated = [is_inexact(x) for x in arrays]

        def run(*moved: Any) -> list[Any]:
            consts, init, xs = ctx.body.split(_fill(arrays, differentiated, moved))
            last, ys = scan(partial(ctx.body.call, consts), init, xs, reverse=ctx.reverse, beside=consts)
            return [y for y in (*last, *ys) if is_inexact(y)]

        chosen = lambda values: [x for x, m in zip(values, differentiated, strict=True) if m]
        outs = iter(jax.jvp(run, chosen(arrays), chosen(tangents))[1])
        whole = jax.eval_shape(lambda: scan(partial(ctx.body.call, consts), init, xs, reverse=ctx.reverse, beside=consts))
        return tuple(next(outs) if is_inexact(y) else None for y in jax.tree.leaves(whole))

    @staticmethod
    def example(key, dtype):
        w, c, xs = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), ((3, 3), (3,), (4, 3)), strict=True))

        def call(consts: Leaves, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
            (w,), (c, count), (x,) = consts, carry, x
            new = jnp.sin(w @ c) + x * (1 + count)
            return [new, count + 1], [new * c]

        return Body(call, 1, 2), True, w, c, jnp.zeros((), jnp.int32), xs

    @staticmethod
    def examples(key, dtype):
        body, _, w, c, count, xs = CheckpointedScanFunction.example(key, dtype)
        return {
            "in order": (body, False, w, c, count, xs),
            "no steps": (body, True, w, c, count, xs[:0]),
            "zeros": (body, True, w, 0 * c, count, 0 * xs),
        }


def _fill(arrays: Sequence[Any], differentiated: Sequence[bool], moved: Sequence[Any]) -> list[Any]:
    """`arrays` with `moved` in the places that move."""
    given = iter(moved)
    return [next(given) if m else x for x, m in zip(arrays, differentiated, strict=True)]


def _pull_of(body: Body, arrays: Sequence[Any], differentiated: Sequence[bool]) -> Callable[[Leaves], Sequence[Any]]:
    """The pullback of one step: from its inexact outputs to the arrays that move."""

    def outputs(*moved: Any) -> list[Any]:
        carry, y = body.call(*body.split(_fill(arrays, differentiated, moved)))
        return [o for o in (*carry, *y) if is_inexact(o)]

    return jax.vjp(outputs, *(x for x, m in zip(arrays, differentiated, strict=True) if m))[1]


def _parts(body: Body, differentiated: Sequence[bool], grads: Sequence[Any]) -> tuple[Leaves, Leaves, Leaves]:
    """Gradients of the arrays that move, as those of consts, carry and x."""
    consts, carry, _ = (sum(flags) for flags in body.split(differentiated))
    return list(grads[:consts]), list(grads[consts : consts + carry]), list(grads[consts + carry :])


def keep_each(step: Step, carry: Any, xs: Any, length: int, *, reverse: bool) -> tuple[Any, Any]:
    """`jax.lax.scan(step, carry, xs, length, reverse)` that keeps the carry before each step and computes the step again in backward."""
    xs = (xs, None) if jax.tree.leaves(xs) else (xs, jnp.arange(length))
    first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    closed, shapes = jax.make_jaxpr(lambda c, x: step(c, x[0]), return_shape=True)(carry, first)

    def call(consts: Leaves, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        outs = eval_jaxpr(closed.jaxpr, consts, *carry, *x)
        return outs[: len(carry)], outs[len(carry) :]

    consts = [c if isinstance(c, jax.Array) else jnp.asarray(c, c.dtype) for c in closed.consts]
    flat, tree = jax.tree.flatten(carry)
    outs = CheckpointedScanFunction.apply(Body(call, len(consts), len(flat)), reverse, *consts, *flat, *jax.tree.leaves(xs))
    return tree.unflatten(outs[: len(flat)]), jax.tree.structure(shapes[1]).unflatten(outs[len(flat) :])
