"""Arrays that a Python function holds in its closure, taken out so that they can be passed as arguments.

A rule that calls such a function after the trace that made the arrays has ended would leak a tracer.
"""

from __future__ import annotations

import collections
import functools
import gc
import types
from collections import abc
from collections.abc import Callable
from typing import Any

import jax

from layers.core import compat


def is_iterator(x: Any) -> bool:
    """Whether `x` gives its content only once: a leaf of pytrees."""
    return isinstance(x, abc.Iterator)


Rebuild = Callable[[list[Any]], Any]


def traced_names(fn: Any) -> list[str]:
    """The names of the variables in the closure of `fn` that hold traced arrays, themselves or in the closure of a function."""
    if isinstance(fn, functools.partial):
        return [*traced_names(fn.func), *(["an argument of a partial"] if _has_tracer((fn.args, fn.keywords), {id(fn)}) else [])]
    fn = getattr(fn, "__func__", fn)
    cells = getattr(fn, "__closure__", None)
    return [name for name, cell in zip(fn.__code__.co_freevars, cells, strict=True) if _has_tracer(_content(cell), {id(fn)})] if cells else []


def hoist(fn: Any, where: str) -> tuple[list[Any], Rebuild]:
    """The traced arrays in the closure of `fn`, and how to make `fn` anew from as many arrays.

    Looks into the closures, defaults and keyword defaults of Python functions, into `functools.partial`, bound methods, and the pytrees and
    functions that they hold.

    Args:
        fn: any object.
        where: what it is, for messages.

    Returns:
        `(arrays, rebuild)`; `rebuild(arrays)` behaves like `fn` with these arrays in place of its own. Without traced arrays, `([], ...)`
        where `rebuild([])` is `fn` itself.

    Raises:
        TypeError: where a traced array cannot be taken out: in an object that JAX cannot look into, or in functions that call each other.
    """
    cycles: list[Any] = []
    arrays, rebuild = _hoist(fn, where, (), cycles)
    if arrays and cycles:
        raise TypeError(f"{where} is a recursive function that closes over a traced array: pass the array as an argument of its own")
    return arrays, rebuild


def _hoist(fn: Any, where: str, above: tuple[Any, ...], cycles: list[Any]) -> tuple[list[Any], Rebuild]:
    if any(fn is f for f in above):
        cycles.append(fn)
        return [], lambda _: fn
    parts, make = parts_of(fn)
    if make is None:
        _refuse_hidden_tracers(fn, where)
        return [], lambda _: fn
    leaves, tree = jax.tree.flatten(parts, is_leaf=is_iterator)
    arrays: list[Any] = []
    rebuilders: list[tuple[int, int, Rebuild]] = []
    for leaf in leaves:
        start = len(arrays)
        inner, rebuild = ([leaf], lambda given: given[0]) if isinstance(leaf, compat.Tracer) else _hoist(leaf, where, (*above, fn), cycles)
        arrays += inner
        rebuilders.append((start, len(arrays), rebuild))
    if not arrays:
        return [], lambda _: fn
    return arrays, lambda given: make(*tree.unflatten([rebuild(given[a:b]) for a, b, rebuild in rebuilders]))


def parts_of(fn: Any) -> tuple[tuple[Any, ...], Callable[..., Any] | None]:
    """What a callable is made of, and how to make one from as much; nothing for any other object."""
    if isinstance(fn, functools.partial):
        return (fn.func, fn.args, fn.keywords), lambda f, a, k: functools.partial(f, *a, **k)
    if isinstance(fn, types.MethodType):
        return (fn.__func__, fn.__self__), types.MethodType
    if isinstance(fn, types.FunctionType):
        contents = tuple(_content(c) for c in fn.__closure__ or ())
        make = functools.partial(_remake, fn.__code__, fn.__globals__, fn.__name__, dict(fn.__dict__))
        return (contents, fn.__defaults__, fn.__kwdefaults__), make
    return (), None


def _remake(code: types.CodeType, names: dict[str, Any], name: str, attributes: dict[str, Any], contents: Any, defaults: Any, kwdefaults: Any) -> Any:
    cells = tuple(types.CellType() if x is _EMPTY else types.CellType(x) for x in contents)
    made = types.FunctionType(code, names, name, defaults, cells)
    made.__kwdefaults__ = kwdefaults
    made.__dict__.update(attributes)
    return made


def _refuse_hidden_tracers(x: Any, where: str, above: tuple[Any, ...] = ()) -> None:
    """Raises where an object that JAX cannot look into holds a traced array, which would leak."""
    advice = "which JAX cannot see there. Pass (or keep) the array itself, or register the class as a pytree."
    wrapped = getattr(x, "__wrapped__", None)
    for name in traced_names(wrapped) if callable(wrapped) else ():
        raise TypeError(f"{where} is a {type(x).__name__} that holds a traced array in its closure, `{name}`, {advice}")
    for value in _held(x):
        if _has_tracer(value, set()):
            raise TypeError(f"{where} is a {type(x).__name__} that holds a traced array, {advice}")
        for leaf in jax.tree.leaves(value, is_leaf=is_iterator):
            if not any(leaf is a for a in (x, *above)):
                _refuse_hidden_tracers(leaf, where, (x, *above))
    for key, value in getattr(x, "__dict__", {}).items():
        if any(isinstance(leaf, compat.Tracer) for leaf in jax.tree.leaves(value, is_leaf=is_iterator)):
            raise TypeError(f"{where} is a {type(x).__name__} that holds a traced array in `.{key}`, {advice}")


def _held(x: Any) -> list[Any]:
    """What a container or iterator that is no pytree holds."""
    if isinstance(x, types.GeneratorType):
        return [] if x.gi_frame is None else list(x.gi_frame.f_locals.values())
    if isinstance(x, abc.Mapping):
        return list(x.values())
    if isinstance(x, (abc.Set, abc.ValuesView, collections.deque)):
        return list(x)
    return [y for y in gc.get_referents(x) if not isinstance(y, type)] if isinstance(x, abc.Iterator) else []


class _Empty:
    """The content of a cell that has none yet."""


_EMPTY = _Empty()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _has_tracer(x: Any, seen: set[int]) -> bool:
    for leaf in jax.tree.leaves(x, is_leaf=is_iterator):
        if isinstance(leaf, compat.Tracer):
            return True
        parts, make = parts_of(leaf)
        if make is not None and id(leaf) not in seen:
            seen.add(id(leaf))
            if _has_tracer(parts, seen):
                return True
    return False
