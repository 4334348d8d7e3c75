"""Arrays that a Python function holds in its closure, taken out so that they can be passed as arguments.

A rule that calls such a function after the trace that made the arrays has ended would leak a tracer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax

from layers.core import compat


def traced_names(fn: Any) -> list[str]:
    """The names of the variables in the closure of `fn` that hold traced arrays."""
    fn = getattr(fn, "__func__", fn)
    cells = getattr(fn, "__closure__", None) or ()
    return [name for name, cell in zip(fn.__code__.co_freevars, cells, strict=True) if _has_tracer(_content(cell))] if cells else []


def hoist(fn: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The traced arrays in the closure of `fn`, and how to make `fn` anew from as many arrays.

    Looks into the closures, defaults and keyword defaults of Python functions, into `functools.partial`, bound methods, and the pytrees and
    functions that they hold.

    Returns:
        `(arrays, rebuild)`; `rebuild(arrays)` behaves like `fn` with these arrays in place of its own. Without traced arrays, `([], ...)`
        where `rebuild([])` is `fn` itself.
    """
    if isinstance(fn, functools.partial):
        return _hoist_parts((fn.func, fn.args, fn.keywords), fn, lambda f, a, k: functools.partial(f, *a, **k))
    if isinstance(fn, types.MethodType):
        return _hoist_parts((fn.__func__, fn.__self__), fn, types.MethodType)
    if not isinstance(fn, types.FunctionType):
        return [], lambda _: fn
    contents = tuple(_content(c) for c in fn.__closure__ or ())
    make = functools.partial(_remake, fn.__code__, fn.__globals__, fn.__name__, dict(fn.__dict__))
    return _hoist_parts((contents, fn.__defaults__, fn.__kwdefaults__), fn, make)


def _remake(code: types.CodeType, names: dict[str, Any], name: str, attributes: dict[str, Any], contents: Any, defaults: Any, kwdefaults: Any) -> Any:
    cells = tuple(types.CellType() if x is _EMPTY else types.CellType(x) for x in contents)
    made = types.FunctionType(code, names, name, defaults, cells)
    made.__kwdefaults__ = kwdefaults
    made.__dict__.update(attributes)
    return made


def _hoist_parts(parts: tuple[Any, ...], whole: Any, make: Callable[..., Any]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    leaves, tree = jax.tree.flatten(parts)
    arrays: list[Any] = []
    rebuilders: list[Callable[[list[Any]], Any]] = []
    for leaf in leaves:
        start = len(arrays)
        if isinstance(leaf, compat.Tracer):
            arrays.append(leaf)
            rebuilders.append(lambda given, i=start: given[i])
        else:
            inner, rebuild = hoist(leaf) if leaf is not whole else ([], lambda _, x=leaf: x)
            arrays += inner
            rebuilders.append(lambda given, a=start, b=len(arrays), r=rebuild: r(given[a:b]))
    if not arrays:
        return [], lambda _: whole
    return arrays, lambda given: make(*jax.tree.unflatten(tree, [r(given) for r in rebuilders]))


class _Empty:
    """The content of a cell that has none yet."""


_EMPTY = _Empty()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _has_tracer(x: Any) -> bool:
    return any(isinstance(leaf, compat.Tracer) for leaf in jax.tree.leaves(x))
