"""`rewrite(fn)`: the same function, its parts computed by this library where it has a better rule.

trace      fn becomes a jaxpr, and that a graph in one spelling (`reading.py`)
match      each pattern starts at its middle and follows the data from there; it says what it explains, reads and makes (`patterns.py`)
choose     a match is taken where nothing outside reads from inside, and where it frees more than it keeps (`match.py`, `profit.py`)
evaluate   the rest as it is, a match by a call of this library, under the scopes and source line of the original (`evaluation.py`)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from layers.checking.audit import WAYS
from layers.core import checks, compat
from layers.core.trees import replaced
from layers.rewriting.evaluation import Program
from layers.rewriting.modules import changes, put_back, take_out, variables_of, write_back
from layers.rewriting.nested import enter
from layers.rewriting.patterns import PATTERNS, find_all
from layers.rewriting.reading import read
from layers.rewriting.report import RewriteReport, Row, note_of


def rewrite(fn: Callable[..., Any] | None = None, *, only: str | Iterable[str] | None = None, skip: str | Iterable[str] | None = None) -> Any:
    """Returns `fn` with its parts computed by this library where it has a better rule: the same values and derivatives, less memory.

    A transformation like `jax.jit`: `fn` is any JAX function, of any library's modules. It is traced once for each signature, and what
    it computes is looked through for attention, cross entropy, norms, perceptrons and activations as people write them. A part is replaced only
    where every use of it is accounted for, where shapes, axes, dtypes, constants and masks fit, and where it frees more memory than it
    keeps; the rest stays as it is. Values are the same within the rounding of the narrowest dtype inside a part, and where the original is
    NaN or infinite because of an overflow they may be finite.

    It belongs inside of `jax.grad`: `jax.grad(layers.rewrite(loss))`. The other way round there is a backward pass already.

    Args:
        fn: a function of arrays and pytrees; other arguments are part of the program. None to use `rewrite(only=...)` as a decorator.
        only: the names of the patterns that may be replaced, of "attention", "cross_entropy", "norm", "mlp", "activation", "elementwise", which is
            any other group of elementwise operations, and "product", which is one whose operands are made of what is alive anyway; None for all.
        skip: the names of patterns that may not.

    Returns:
        The function, with the same signature. `.report(*args)` says what is replaced for such arguments, and what nearly was.

    Raises:
        TypeError: where `fn` is no function.
        ValueError: for a name that is no pattern.
    """
    names = _chosen(only, skip)
    if fn is None:
        return functools.partial(rewrite, only=only, skip=skip)
    return Rewritten(checks.function("rewrite", "fn", fn), names)


def _chosen(only: Any, skip: Any) -> tuple[str, ...]:
    chosen = PATTERNS if only is None else [checks.choice("rewrite", "only", x, PATTERNS) for x in checks.several(only)]
    left = [checks.choice("rewrite", "skip", x, PATTERNS) for x in (() if skip is None else checks.several(skip))]
    return tuple(p for p in PATTERNS if p in chosen and p not in left)


class Rewritten:
    """A function that was rewritten; `rewrite` makes it."""

    def __init__(self, fn: Callable[..., Any], names: tuple[str, ...]):
        functools.update_wrapper(self, fn)
        self._fn, self._names = fn, names
        self._called: set[Any] = set()
        self._jitted = jax.jit(self._run, static_argnums=0, inline=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, modules = take_out((args, kwargs))
        graph, state = nnx.split(tuple(modules))
        held = variables_of(modules)
        signature, arrays = _divide((given, state), graph)
        run = self._run if self._is_new(signature, arrays) else self._jitted
        out, changed = run(signature, *arrays)
        write_back(modules, held, changed)
        return out

    def _is_new(self, signature: Signature, arrays: Sequence[Any]) -> bool:
        """Whether to trace in place: where nothing can be cached, or a larger program is traced that calls it for the first time.

        By way of jit each rule would be traced as it is and once more to be differentiated; later calls take that from the cache.
        """
        if not signature.is_hashable:
            return True
        call = signature, tuple(map(jax.typeof, arrays))
        is_new = call not in self._called and compat.is_staged()
        self._called.add(call)
        return is_new

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def report(self, *args: Any, **kwargs: Any) -> RewriteReport:
        """What is replaced where the function is called with these arguments, or with `jax.ShapeDtypeStruct`s; nothing is computed."""
        given, modules = take_out((args, kwargs))
        graph, state = nnx.split(tuple(modules))
        rows: list[Row] = []
        program, _ = self._rewritten(*_divide((given, state), graph), rows)
        return RewriteReport(getattr(self._fn, "__name__", "function"), rows, note_of(program.graph))

    def _run(self, signature: Signature, *arrays: Any) -> Any:
        program, tree = self._rewritten(signature, arrays, [])
        return jax.tree.unflatten(tree, program(*arrays))

    def _rewritten(self, signature: Signature, arrays: Sequence[Any], rows: list[Row]) -> tuple[Program, Any]:
        def flat(*arrays: Any) -> Any:
            given, state = signature.join(arrays)
            modules = nnx.merge(signature.graph, state)
            before = variables_of(modules)
            args, kwargs = put_back(given, modules)
            return self._fn(*args, **kwargs), changes(modules, before)

        traced, shape = jax.make_jaxpr(flat, return_shape=True)(*arrays)
        program = _program(compat.open_jaxpr(traced), traced.consts, {}, (), self._names, rows)
        return program, jax.tree.structure(shape)


def _program(
    jaxpr: Any, consts: Sequence[Any], known: Any, place: tuple[str, ...], names: tuple[str, ...], rows: list[Row], carried: Sequence[int] = ()
) -> Program:
    graph = read(jaxpr, consts, known, carried)
    found = find_all(graph, names)
    rows += [Row.of_match(m, place) for m in found.matches] + [Row.of_miss(m, place) for m in found.misses]

    def inside(jaxpr: Any, consts: Sequence[Any], known: Any, where: str, carried: Sequence[int]) -> Program | None:
        program = _program(jaxpr, consts, known, (*place, where), names, rows, carried)
        return program if program.matches or any(n.inner for n in program.graph.nodes) else None

    taken = {n for m in found.matches for n in m.nodes}
    for n in graph.nodes:
        if n not in taken:
            n.inner = enter(n, inside)
    return Program(graph, found.matches)


class Signature:
    """The arguments of a call without their arrays, hashable where these are, so that what it leads to is traced once."""

    def __init__(self, tree: Any, fixed: tuple[Any, ...], indices: tuple[int, ...], graph: Any):
        self.tree, self.fixed, self.indices, self.graph = tree, fixed, indices, graph

    def join(self, arrays: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.tree, replaced(self.fixed, self.indices, arrays))

    @property
    def is_hashable(self) -> bool:
        try:
            hash(self)
        except TypeError:
            return False
        return True

    @property
    def _key(self) -> Any:
        return self.tree, self.fixed, tuple(map(type, self.fixed)), self.indices, self.graph

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self._key == other._key


def _divide(values: Any, graph: Any) -> tuple[Signature, list[Any]]:
    """The signature and the arrays of a pytree, beside the graph of its modules."""
    leaves, tree = jax.tree.flatten(values)
    indices = tuple(i for i, x in enumerate(leaves) if _is_array(x))
    fixed = tuple(None if _is_array(x) else x for x in leaves)
    return Signature(tree, fixed, indices, graph), [leaves[i] for i in indices]


def _is_array(x: Any) -> bool:
    number = isinstance(x, (int, float, complex, np.generic)) and not isinstance(x, bool)
    return number or isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


WAYS["layers.rewrite(fn)"] = lambda fn, args: (fn, args, rewrite)
