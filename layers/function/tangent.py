"""The linear operation behind every `Function`: forward it is the tangent map, transposed it is `backward`.

A custom rule has to be seen by reverse mode (which transposes), forward mode (which evaluates), `vmap` (which batches) and
by derivatives of derivatives. As one linear operation with all four rules it is right under each, and none can bypass it.

Forward   outs = map.push(residuals, tangents)            linear in `tangents`
Transpose tangents_bar = map.pull(residuals, outs_bar)    the `backward` of the Function
Batched   the same with both sides under `jax.vmap`; a cotangent is summed over the batch where its operand is shared, and the
          cotangent of an output that the batch shares enters once, not once for each element.

Reference: the transposition of linear maps in Radul et al., "You Only Linearize Once", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import compat
from layers.core.trees import replaced

Arrays = Sequence[Any]


@dataclass(frozen=True, eq=False)
class TangentMap:
    """A linear map given by hand in both directions.

    Attributes:
        name: shown in printed programs.
        residual_count: how many of the operands are residuals; the tangents follow.
        out_avals: the types of the outputs.
        push: `(residuals, tangents) -> outs`.
        pull: `(residuals, cotangents, wanted) -> cotangents of the tangents`, None for zero on both sides.
        once: whether to refuse the derivative with respect to residuals.
    """

    name: str
    residual_count: int
    out_avals: tuple[Any, ...]
    push: Callable[[Arrays, Arrays], Arrays]
    pull: Callable[[Arrays, Arrays, tuple[bool, ...]], Arrays]
    once: bool = False

    def __repr__(self) -> str:
        return self.name

    def split(self, operands: Arrays) -> tuple[list[Any], list[Any]]:
        return list(operands[: self.residual_count]), list(operands[self.residual_count :])

    def __call__(self, residuals: Arrays, tangents: Arrays) -> list[Any]:
        return _bind(*residuals, *tangents, map=self)


def _evaluate(*operands: Any, map: TangentMap) -> Arrays:
    return map.push(*map.split(operands))


def _transpose(cotangents: Arrays, *operands: Any, map: TangentMap) -> list[Any]:
    residuals, tangents = map.split(operands)
    wanted = tuple(t is None for t in tangents)
    return [None] * len(residuals) + list(map.pull(residuals, cotangents, wanted))


def _jvp(primals: Arrays, dots: Arrays, *, map: TangentMap) -> tuple[list[Any], list[Any]]:
    residuals, tangents = map.split(primals)
    residuals_dot, tangents_dot = map.split(dots)
    outs = map(residuals, tangents)
    terms: list[list[Any]] = []
    if any(t is not None for t in tangents_dot):
        filled = [compat.zeros(jax.typeof(t)) if d is None else d for t, d in zip(tangents, tangents_dot, strict=True)]
        terms.append(map(residuals, filled))
    differentiated = [i for i, d in enumerate(residuals_dot) if d is not None]
    if differentiated and map.once:
        refuse_second_derivative(map.name)
    if differentiated:

        def push(*moved: Any) -> list[Any]:
            return list(map.push(replaced(residuals, differentiated, moved), tangents))

        terms.append(jax.jvp(push, [residuals[i] for i in differentiated], [residuals_dot[i] for i in differentiated])[1])
    if not terms:
        return outs, [None] * len(outs)
    return outs, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def refuse_second_derivative(name: str) -> None:
    """Raises what a second differentiation of a `once_differentiable` rule raises."""
    raise RuntimeError(f"{name}: trying to differentiate twice a function that was marked with @once_differentiable")


def _batch(axis: Any, operands: Arrays, dims: Sequence[int | None], *, map: TangentMap) -> tuple[list[Any], list[int | None]]:
    operands = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
    in_axes = [None if d is None else 0 for d in dims]
    out_axes = _out_axes(map, operands, in_axes)
    residual_axes, tangent_axes = map.split(in_axes)
    vmap = partial(jax.vmap, axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name)

    def push(residuals: Arrays, tangents: Arrays) -> Arrays:
        return vmap(map.push, in_axes=(residual_axes, tangent_axes), out_axes=out_axes)(residuals, tangents)

    def pull(residuals: Arrays, cotangents: Arrays, wanted: tuple[bool, ...]) -> Arrays:
        cotangents = [c if c is None or a == 0 else _first_of(axis.size, c) for c, a in zip(cotangents, out_axes, strict=True)]
        inner = vmap(lambda r, c: list(map.pull(r, c, wanted)), in_axes=(residual_axes, 0))
        grads = inner(residuals, cotangents)
        return [g if g is None or a == 0 else g.sum(0) for g, a in zip(grads, tangent_axes, strict=True)]

    avals = tuple(o if a is None else compat.with_leading_axis(o, axis) for o, a in zip(map.out_avals, out_axes, strict=True))
    batched = replace(map, out_avals=avals, push=push, pull=pull)
    return _bind(*operands, map=batched), out_axes


def _out_axes(map: TangentMap, operands: Arrays, in_axes: Sequence[int | None]) -> list[int | None]:
    """Which outputs differ along the batch: those that depend on an operand that does."""
    if all(a == 0 for a in in_axes):
        return [0] * len(map.out_avals)
    examples = jax.eval_shape(lambda xs: [x if a is None else x[0] for x, a in zip(xs, in_axes, strict=True)], list(operands))
    try:
        varies = compat.depends_on(lambda *xs: map.push(*map.split(xs)), examples, [a == 0 for a in in_axes])
    except Exception:  # a backward rule that cannot be transposed: every output is taken to differ, which is always right
        return [0] * len(map.out_avals)
    return [0 if v else None for v in varies]


def _first_of(size: int, x: jax.Array) -> jax.Array:
    return jnp.zeros((size, *x.shape), x.dtype).at[0].set(x)


_bind = compat.define_linear_primitive(
    "function_tangent",
    out_avals=lambda map: map.out_avals,
    evaluate=_evaluate,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batch,
)
