"""What the backward pass of a JAX function keeps alive: array by array, with bytes, layer and source line.

`jax.vjp` is traced, not run: its result holds every array that the backward pass reads, the residuals. Each is followed to the operation
that made it. The figures are exact where forward and backward are compiled apart; inside one `jit`, XLA may fuse a recomputation
and keep less, so there they are an upper bound.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.checking.audit import Residual, Residuals
from layers.checking.producers import Producer, clean_scope, find_producer
from layers.checking.scopes import module_scopes
from layers.core import checks, compat
from layers.core.trees import is_array, is_number, replaced

_PARTS = ("layers", "core"), ("layers", "function"), ("layers", "checking"), ("flax",), ("equinox",)
_LIBRARY = tuple(os.sep + os.path.join(*parts) + os.sep for parts in _PARTS)


def residuals(fn: Callable[..., Any], *args: Any, wrt: int | Sequence[int] | None = None) -> Residuals:
    """Says what the backward pass of `fn(*args)` keeps alive.

    Args:
        fn: any differentiable JAX function, or an nnx module, whose parameters then count as its first argument.
        *args: its arguments: arrays, pytrees, nnx modules (whose paths name the layers), or `jax.ShapeDtypeStruct`s. Nothing is computed.
        wrt: the arguments to differentiate by their place, negative ones from the end; all by default.

    Returns:
        The audit: `.rows`, `.extra` and `.total` (bytes), `.by_layer()`, `.compare(other_fn)`, `.plot()`.

    Raises:
        TypeError: where no argument can be differentiated.
        ValueError: where `wrt` names an argument that there is not.
    """
    return _audit(checks.function("residuals", "fn", fn), args, wrt, lambda f: f)


def _audit(fn: Any, args: tuple[Any, ...], wrt: int | Sequence[int] | None, transform: Callable[..., Any]) -> Residuals:
    """The audit of `fn`, transformed as a function of the arrays of its arguments."""
    title, whole = getattr(fn, "__name__", type(fn).__name__), fn
    given, first = args, int(isinstance(fn, nnx.Module))
    if isinstance(fn, nnx.Module):
        fn, args = (lambda module, *a: module(*a)), (fn, *args)
    leaves, tree = jax.tree.flatten(args)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args)]
    for name, x in zip(names, leaves, strict=True):
        if not (is_array(x) or is_number(x) or isinstance(x, (bool, jax.ShapeDtypeStruct))):
            raise TypeError(f"residuals: args{name} is {checks.shown(x)}, but must be an array or a number: let a function pass on what is neither")
    chosen = checks.indices("residuals", "wrt", wrt, len(args))
    of_argument = [i for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
    differentiated = [i for i, x in enumerate(leaves) if of_argument[i] in chosen and jnp.issubdtype(jnp.result_type(x), np.inexact)]
    if not differentiated:
        raise TypeError(f"residuals: no argument of {title} can be differentiated: at least one must hold floating-point arrays (see wrt)")
    with module_scopes(args) as note:

        def of_leaves(*flat: Any) -> Any:
            values = tree.unflatten(flat)
            note(values)
            return fn(*values)

        transformed = transform(of_leaves)

        def run(*flat: Any) -> Any:
            def of_moving(*moved: Any) -> Any:
                return transformed(*replaced(flat, differentiated, moved))

            return jax.vjp(of_moving, *[flat[i] for i in differentiated])

        traced, (out, vjp) = jax.make_jaxpr(run, return_shape=True)(*leaves)
    jaxpr = compat.open_jaxpr(traced)
    kept = jaxpr.outvars[len(jaxpr.outvars) - len(jax.tree.leaves(vjp)) :]
    backward = compat.open_jaxpr(jax.make_jaxpr(lambda pull, ct: pull(ct))(vjp, _cotangent(out)))
    used = compat.used_inputs(backward)[: len(kept)]

    def again(other: Any, others: Any = None) -> Residuals:
        if others is not None:
            return residuals(other, *others)
        shift = int(isinstance(other, nnx.Module)) - first
        return residuals(other, *given, wrt=None if wrt is None else [i + shift for i in chosen if i + shift >= 0])

    def of_way(way: Any) -> Residuals | None:
        changed = way(whole, given)
        return None if changed is None else _audit(changed[0], changed[1], wrt, changed[2])

    return Residuals(_rows(jaxpr, kept, used, names), title, again, of_way)


def _cotangent(out: Any) -> Any:
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, np.inexact) else np.zeros(a.shape, jax.dtypes.float0), out)


def _rows(jaxpr: Any, kept: Sequence[Any], used: Sequence[bool], names: Sequence[str]) -> list[Residual]:
    rows: dict[int, Residual] = {}
    for variable, is_used in zip(kept, used, strict=True):
        if not hasattr(variable.aval, "shape"):
            continue
        before = rows.get(id(variable))
        if before is None or (is_used and not before.used):
            rows[id(variable)] = _row(jaxpr, variable, bool(is_used), names)
    return list(rows.values())


def _row(jaxpr: Any, variable: Any, used: bool, names: Sequence[str]) -> Residual:
    aval = variable.aval
    itemsize = 8 if compat.is_key(aval) else np.dtype(aval.dtype).itemsize
    nbytes = int(np.prod(aval.shape, dtype=np.int64)) * itemsize
    shape, dtype = tuple(aval.shape), str(aval.dtype)
    if hasattr(variable, "val"):
        return Residual("constant", nbytes, shape, dtype, used=used)
    made = find_producer(jaxpr, variable)
    if made.eqn is None:
        place = next((i for i, v in enumerate(jaxpr.invars) if v is made.variable), None)
        if place is None:
            return Residual("constant", nbytes, shape, dtype, used=used)
        return Residual("argument", nbytes, shape, dtype, layer=f"args{names[place]}", used=used)
    return Residual(
        "extra",
        nbytes,
        shape,
        dtype,
        layer=clean_scope(made.scope),
        operation=_operation(made),
        source=_source(made),
        name=made.name,
        repeats=tuple(made.repeats),
        used=used,
    )


def _operation(made: Producer) -> str:
    """The primitive, and the innermost jitted function that it is in."""
    jitted = [str(call.params["name"]) for call in made.calls if call.primitive.name in ("jit", "pjit")]
    return made.eqn.primitive.name + (f" in {jitted[-1].lstrip('_')}" if jitted else "")


def _source(made: Producer) -> str:
    """The innermost line of a person's code: in a jitted function of JAX there is none, and the line that calls it is the one."""
    seen = [compat.source_frames(eqn) for eqn in (made.eqn, *reversed(made.calls))]
    own = [f for frames in seen for f in frames if not any(part in f[0] for part in _LIBRARY)] or [f for frames in seen for f in frames]
    return f"{os.path.basename(own[0][0])}:{own[0][1]} ({own[0][2]})" if own else ""
