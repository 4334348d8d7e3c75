"""`jax.custom_vjp` as people write it, on the engine of `Function`.

The rules are those of JAX, and become a `Function`: `forward` is `fun` where nothing is differentiated and `fwd` where something is, `backward`
is `bwd` with the residuals that `fwd` returned. So they have forward mode and derivatives to any order, and right gradients where one traced call
is differentiated in two patterns.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal

from layers.core import checks, compat
from layers.core.trees import is_array, is_number
from layers.function.closures import traced_names
from layers.function.context import Context
from layers.function.function import Function


class custom_vjp:
    """Gives a JAX function a gradient of its own, as `jax.custom_vjp`, whose place it takes: the import is all that changes.

    What it adds: forward mode (`jax.jvp`, `jax.hessian`), a clear error where a rule closes over a traced array, gradients that are cast and
    summed to their argument, and right gradients where one jitted call is differentiated in two patterns.

    Args:
        fun: the function; its arguments and results are pytrees of arrays, or anything else, which is not traced.
        nondiff_argnums, nondiff_argnames: arguments that are passed to the rules as they are, and to `bwd` before all others.

    Raises:
        AttributeError: where it is called before `defvjp`.
        TypeError: where arguments do not fit, a rule closes over a traced array, or one of `nondiff_argnums` holds one.
    """

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: int | Sequence[int] = (), nondiff_argnames: str | Sequence[str] = ()):
        self.fun = checks.function("custom_vjp", "fun", fun)
        functools.update_wrapper(self, fun)
        try:
            self._signature: inspect.Signature | None = inspect.signature(fun)
        except ValueError:  # a function of C, which takes no keywords here
            self._signature = None
        self.nondiff_argnums = _places(self._name, self._signature, nondiff_argnums, nondiff_argnames)
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None

    @property
    def _name(self) -> str:
        return getattr(self.fun, "__name__", type(self.fun).__name__)

    def defvjp(
        self, fwd: Callable[..., tuple[Any, Any]], bwd: Callable[..., tuple[Any, ...]], symbolic_zeros: bool = False, optimize_remat: bool = False
    ) -> None:
        """Sets the rules.

        Args:
            fwd: takes what `fun` takes; returns the output and the residuals, a pytree.
            bwd: takes the arguments of `nondiff_argnums`, the residuals and the cotangent of the output, in its structure; returns a tuple of one
                cotangent for each other argument, in its structure, with None for zero.
            symbolic_zeros: `fwd` gets a `CustomVJPPrimal` for each array, which says whether it is differentiated, and `bwd` a `SymbolicZero` for a
                cotangent that is absent.
            optimize_remat: has no effect: the forward pass under `jax.checkpoint` is `fun` at all times.
        """
        who = f"{self._name}.defvjp"
        fwd, bwd = checks.function(who, "fwd", fwd), checks.function(who, "bwd", bwd)
        symbolic_zeros, optimize_remat = checks.flag(who, "symbolic_zeros", symbolic_zeros), checks.flag(who, "optimize_remat", optimize_remat)
        if symbolic_zeros and optimize_remat:
            raise NotImplementedError(f"{who}: optimize_remat does not go with symbolic_zeros, as in JAX")
        self.fwd, self.bwd, self.symbolic_zeros, self.optimize_remat = fwd, bwd, symbolic_zeros, optimize_remat
        self._function = _function(self, fwd, bwd)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fwd is None or self.bwd is None:
            raise AttributeError(f"{self._name} has no rules: call {self._name}.defvjp(fwd, bwd) first")
        for fn in (self.fun, self.fwd, self.bwd):
            names = traced_names(fn)
            if names:
                raise TypeError(
                    f"{getattr(fn, '__name__', self._name)}, of the rules of {self._name}, closes over a traced array ({', '.join(names)}), "
                    "which has no gradient there and may leak: pass it as an argument"
                )
        given = self._positional(args, kwargs)
        passed = [self._static(i, a) if i in self.nondiff_argnums else jax.tree.map(_as_array, a) for i, a in enumerate(given)]
        return self._function.apply(*passed)[0]

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if self._signature is None:
            if kwargs:
                raise TypeError(f"{self._name}: the function has no signature, so give its arguments by position")
            return args
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}; it takes {self._signature}") from None
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(f"{self._name}: {', '.join(bound.kwargs)} can be given by keyword only, but rules take their arguments by position")
        return bound.args

    def _static(self, place: int, value: Any) -> Any:
        leaves = jax.tree.leaves(value)
        if any(isinstance(x, compat.Tracer) for x in leaves):
            raise TypeError(
                f"{self._name}: argument {place} is one of nondiff_argnums, but holds a traced array: "
                "pass it as another argument, and return None for it"
            )
        return _Static(value) if any(is_array(x) or is_number(x) for x in leaves) else value


class _Static:
    """An argument that holds arrays and is passed as it is."""

    def __init__(self, value: Any):
        self.value = value


def _opened(x: Any) -> Any:
    return x.value if isinstance(x, _Static) else x


def _as_array(x: Any) -> Any:
    return jnp.asarray(x) if is_number(x) or isinstance(x, (bool, np.ndarray, np.generic)) else x


def _places(name: str, signature: inspect.Signature | None, numbers: Any, names: Any) -> tuple[int, ...]:
    parameters = [] if signature is None else list(signature.parameters)
    given = checks.several(names)
    unknown = [n for n in given if n not in parameters]
    if unknown:
        raise ValueError(f"{name}: nondiff_argnames names {', '.join(map(repr, unknown))}, but the arguments are {', '.join(parameters)}")
    open_ended = signature is None or any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    within = "[0, inf)" if open_ended else f"[0, {len(parameters)})"
    chosen = [checks.integer(name, "nondiff_argnums", n, within) for n in checks.several(numbers)]
    return tuple(sorted({*chosen, *map(parameters.index, given)}))


def _function(owner: custom_vjp, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> type[Function]:
    """The `Function` of the rules. Its output is a list of one, so that the cotangent of that is one, whatever its structure."""
    name = owner._name

    def forward(ctx: Context, *args: Any) -> Any:
        args = tuple(map(_opened, args))
        if not ctx.requires_grad:
            return [owner.fun(*args)]
        if owner.symbolic_zeros:
            ctx.set_materialize_grads(False)
            args = _with_flags(args, ctx._engine.flags, owner.nondiff_argnums)
        pair = fwd(*args)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name}: fwd must return a pair (output, residuals), but returned {type(pair).__name__}")
        output, ctx.residuals = pair
        ctx.avals = [compat.tangent_type(jax.typeof(y)) for y in jax.tree.leaves(output)]
        ctx.static, ctx.count = [args[i] for i in owner.nondiff_argnums], len(args)
        return [output]

    def backward(ctx: Context, cotangents: list[Any]) -> list[Any]:
        given, tree = jax.tree.flatten(cotangents[0], is_leaf=lambda x: x is None)
        absent = [compat.SymbolicZero(a) if owner.symbolic_zeros else compat.zero_tangent(a) for a in ctx.avals]
        filled = [z if g is None or a.dtype == jax.dtypes.float0 else g for g, z, a in zip(given, absent, ctx.avals, strict=True)]
        grads = bwd(*ctx.static, ctx.residuals, tree.unflatten(filled))
        others = [i for i in range(ctx.count) if i not in owner.nondiff_argnums]
        if not isinstance(grads, (tuple, list)) or len(grads) != len(others):
            shown = f"{len(grads)} of them" if isinstance(grads, (tuple, list)) else type(grads).__name__
            raise TypeError(f"{name}: bwd must return a tuple of {len(others)} gradient(s), one for each argument, but returned {shown}")
        by_place = dict(zip(others, grads, strict=True))
        return [by_place.get(i) for i in range(ctx.count)]

    if owner._signature is not None:
        first = inspect.Parameter("_context", inspect.Parameter.POSITIONAL_ONLY)
        rest = [p.replace(kind=p.kind if p.kind is p.VAR_POSITIONAL else p.POSITIONAL_ONLY) for p in owner._signature.parameters.values()]
        forward.__signature__ = inspect.Signature([first, *(p for p in rest if p.kind is not p.VAR_KEYWORD)])  # type: ignore[attr-defined]
    return type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _with_flags(args: tuple[Any, ...], flags: Sequence[bool], static: Sequence[int]) -> tuple[Any, ...]:
    """The arguments as `fwd` gets them under `symbolic_zeros`."""
    given = iter(flags)
    marked = []
    for i, a in enumerate(args):
        leaves, tree = jax.tree.flatten(a)
        own = [next(given) for _ in leaves]
        marked.append(a if i in static else tree.unflatten([CustomVJPPrimal(x, m) for x, m in zip(leaves, own, strict=True)]))
    return tuple(marked)


def from_custom_vjp(fn: Any) -> custom_vjp:
    """Takes a function that `jax.custom_vjp` has made, with its rules, as a `layers.custom_vjp`.

    Raises:
        TypeError: for anything else; AttributeError: where it has no rules yet.
    """
    if not isinstance(fn, jax.custom_vjp):
        raise TypeError(f"from_custom_vjp: fn is {checks.shown(fn)}, but must be what jax.custom_vjp returned: of a jitted one take `fn.__wrapped__`")
    if fn.fwd is None or fn.bwd is None:
        raise AttributeError("from_custom_vjp: fn has no rules: call its defvjp(fwd, bwd) first")
    made = custom_vjp(fn.fun, fn.nondiff_argnums)
    made.defvjp(fn.fwd, fn.bwd, symbolic_zeros=fn.symbolic_zeros, optimize_remat=fn.optimize_remat)
    return made
