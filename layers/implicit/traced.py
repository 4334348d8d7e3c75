"""A Python function of pytrees as a function of two lists of arrays, whatever it closes over included.

The function is traced once. The arrays that it closes over, traced ones too, then stand in the program as constants and become arguments:
they get their gradients like any other argument, and nothing of the trace that made them is held on to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import eval_jaxpr
from jax.sharding import AxisType

from layers.core import compat
from layers.core.trees import is_array
from layers.function.arguments import take_apart


@dataclass(frozen=True, eq=False)
class Traced:
    """`fn(x, *args)` as `call(x_leaves, theta)`.

    Attributes:
        call: takes and returns lists of arrays.
        x: the leaves of the starting point, in the dtype that `fn` returns.
        theta: the arrays of `args` and those that `fn` closes over.
        structure: of `x`.
    """

    call: Callable[[Any, Any], list[Any]]
    x: list[jax.Array]
    theta: list[Any]
    structure: Any


def trace_map(name: str, fn: Callable[..., Any], x0: Any, args: tuple[Any, ...]) -> Traced:
    """For `fn(x, *args)` with the structure and shapes of `x`.

    Raises:
        TypeError: where `x0` is not of floating-point or complex arrays.
        ValueError: where what `fn` returns has another structure or other shapes.
    """
    fn, args = _module_in_arguments(fn, args)
    x, structure = _starting_point(name, x0)
    arrays: list[Any] = []
    template = take_apart(name, "an argument", args, arrays)

    def flat(x: list[Any], arrays: list[Any]) -> list[Any]:
        out = fn(structure.unflatten(x), *template.fill(arrays))
        _require_same(name, structure.unflatten(x), out)
        return [jnp.asarray(y) for y in jax.tree.leaves(out)]

    program = jax.make_jaxpr(flat)(x, arrays)
    settled = _on_same_axes([_like(name, a, b) for a, b in zip(x, program.out_avals, strict=True)], program.out_avals)
    if any(a is not b for a, b in zip(x, settled, strict=True)):
        x, program = settled, jax.make_jaxpr(flat)(settled, arrays)
        for a, b in zip(x, program.out_avals, strict=True):
            if a.dtype != b.dtype:
                raise TypeError(f"{name}: f takes x of {a.dtype} to {b.dtype}, and that has to stay the same; cast what f returns")
    return Traced(_runner(program, len(arrays)), x, [*arrays, *map(_array, program.consts)], structure)


def trace_scalar(name: str, fn: Callable[..., Any], x0: Any, args: tuple[Any, ...]) -> Traced:
    """For `fn(x, *args)` that is a real number; `call` returns it in a list.

    Raises:
        TypeError: where `x0` is not of floating-point or complex arrays.
        ValueError: where what `fn` returns is not a real scalar.
    """
    fn, args = _module_in_arguments(fn, args)
    x, structure = _starting_point(name, x0)
    arrays: list[Any] = []
    template = take_apart(name, "an argument", args, arrays)

    def flat(x: list[Any], arrays: list[Any]) -> list[Any]:
        out = fn(structure.unflatten(x), *template.fill(arrays))
        if not (is_array(out) or isinstance(out, float)) or jnp.shape(out) or not jnp.issubdtype(jnp.result_type(out), np.floating):
            raise ValueError(f"{name}: f must return a real scalar, but returned {_described(out)}")
        return [jnp.asarray(out)]

    program = jax.make_jaxpr(flat)(x, arrays)
    settled = _on_same_axes(x, program.out_avals)
    if any(a is not b for a, b in zip(x, settled, strict=True)):
        x, program = settled, jax.make_jaxpr(flat)(settled, arrays)
    return Traced(_runner(program, len(arrays)), x, [*arrays, *map(_array, program.consts)], structure)


def _module_in_arguments(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A module, or a method of one, as a function that takes the module as an argument: it is then a copy that may change its state."""
    owner = getattr(fn, "__self__", fn)
    if not isinstance(owner, nnx.Module) or jax.tree_util.all_leaves([owner]):
        return fn, args
    if owner is fn:
        return (lambda x, module, *rest: module(x, *rest)), (owner, *args)
    method: Any = fn
    return (lambda x, module, *rest: method.__func__(module, x, *rest)), (owner, *args)


def _runner(program: Any, count: int) -> Callable[[Any, Any], list[Any]]:
    bare = compat.open_jaxpr(program)
    jaxpr = bare.replace(constvars=(), invars=[*bare.constvars, *bare.invars])  # holds on to no constant

    def run(x: Any, theta: Any) -> list[Any]:
        return list(map(_array, eval_jaxpr(jaxpr, (), *theta[count:], *x, *theta[:count])))

    return run


def _starting_point(name: str, x0: Any) -> tuple[list[jax.Array], Any]:
    leaves, structure = jax.tree.flatten(x0)
    for leaf in leaves:
        if not (is_array(leaf) or isinstance(leaf, (float, complex))) or not jnp.issubdtype(jnp.result_type(leaf), np.inexact):
            raise TypeError(f"{name}: x0 must hold floating-point or complex arrays, but holds {_described(leaf)}")
    x = [jnp.asarray(leaf) for leaf in leaves]
    return [lax.convert_element_type(leaf, leaf.dtype) for leaf in x], structure


def _require_same(name: str, x: Any, out: Any) -> None:
    if jax.tree.structure(x) != jax.tree.structure(out):
        raise ValueError(f"{name}: f must return the structure of x, {jax.tree.structure(x)}, but returned {jax.tree.structure(out)}")
    shapes = [(jnp.shape(a), jnp.shape(b)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(out), strict=True)]
    for a, b in shapes:
        if a != b:
            raise ValueError(f"{name}: f must return the shape of x, {a}, but returned {b}; start from an x0 of the right shape")


def _like(name: str, x: jax.Array, aval: Any) -> jax.Array:
    """`x` in the dtype of what f returns, and along the explicit axes of a mesh along which that lies."""
    if not jnp.issubdtype(aval.dtype, np.inexact):
        raise TypeError(f"{name}: f must return floating-point or complex arrays, but returned {aval.dtype}")
    x, place = (x if x.dtype == aval.dtype else x.astype(aval.dtype)), aval.sharding
    return x if AxisType.Explicit not in place.mesh.axis_types or jax.typeof(x).sharding == place else jax.sharding.reshard(x, place)


def _on_same_axes(x: list[jax.Array], outs: Any) -> list[jax.Array]:
    """`x` marked as varying over the mesh axes that any of it and of what f returns varies over (`shard_map`): a solver mixes all of it."""
    axes = frozenset().union(*map(compat.varying_axes, (*map(jax.typeof, x), *outs)))
    missing = [tuple(sorted(axes - compat.varying_axes(jax.typeof(a)))) for a in x]
    return [lax.pcast(a, m, to="varying") if m else a for a, m in zip(x, missing, strict=True)]


def _array(x: Any) -> Any:
    """A constant or an output of a program, which may be a number that carries a dtype, as an array."""
    return x if is_array(x) else jnp.asarray(x, getattr(x, "dtype", None))


def _described(x: Any) -> str:
    return f"an array of {x.dtype}, shape {x.shape}" if is_array(x) else f"a {type(x).__name__}"
