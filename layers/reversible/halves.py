"""Functions and Flax modules as halves of couplings: their arrays taken out, each once, whoever shares it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.core.trees import is_array, is_inexact, replaced
from layers.function.closures import hoist, parts_of
from layers.reversible.chain import Chain, Half
from layers.reversible.streams import Streams

Call = Callable[[list[Any], Any, tuple[Any, ...], dict[str, Any]], tuple[Any, list[Any]]]
"""`(arrays, x, args, kwargs) -> (output, arrays afterwards)`."""


class Arrays:
    """Every array of a chain, once.

    Attributes:
        values: the arrays.
        variables: the Flax variable that an array is the value of, by place.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.variables: dict[int, nnx.Variable] = {}
        self._places: dict[int, int] = {}

    def place(self, value: Any, variable: nnx.Variable | None = None) -> int:
        key = id(value if variable is None else variable)
        if key not in self._places:
            place = self._places[key] = len(self.values)
            self.values.append(value)
            if variable is not None:
                self.variables[place] = variable
        return self._places[key]

    def write(self, changed: dict[int, Any]) -> None:
        """Gives the variables the state that a chain left."""
        for place, value in changed.items():
            self.variables[place].set_value(value)


def make_chain(
    who: str,
    pairs: Sequence[tuple[Any, Any]],
    x1: Any,
    x2: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    streams: Streams,
    length: int | None = None,
) -> tuple[Chain, Arrays]:
    """A chain of couplings and the arrays that it runs on.

    Args:
        who: the public function, for messages.
        pairs: functions or modules; a single pair, with stacked variables, if `length` is given.
        x1, x2: what it will run on.
        args, kwargs: go to every half after its x.
        streams: the arithmetic.
        length: as in `Chain`.
    """
    arrays = Arrays()
    named = [
        (fn, f"{who}: {'fg'[k]} of coupling {i}" if length is None else f"{who}: {'fg'[k]}") for i, p in enumerate(pairs) for k, fn in enumerate(p)
    ]
    own = [_take_apart(fn, name, arrays) for fn, name in named]
    stacked = len(arrays.values) if length is not None else 0
    leaves, tree = jax.tree.flatten((args, kwargs))
    _refuse_streams_of_keys(who, (args, kwargs))
    extra = {k: arrays.place(x) for k, x in enumerate(leaves) if is_array(x)}
    halves = []
    for (indices, call), (_, name), stream in zip(own, named, [x1, x2] * len(pairs), strict=True):
        halves.append(Half(_with_extra(call, len(indices), list(extra), leaves, tree, name, stream), (*indices, *extra.values()), name))
    chain = Chain(tuple(zip(halves[::2], halves[1::2], strict=True)), streams, stacked, length)
    return chain, arrays


def _with_extra(call: Call, count: int, slots: list[int], leaves: list[Any], tree: Any, name: str, stream: Any) -> Any:
    shape, real = stream.shape, not jnp.iscomplexobj(stream)
    static = [None if is_array(x) else x for x in leaves]

    def with_extra(given: list[Any], x: Any) -> tuple[Any, list[Any]]:
        args, kwargs = tree.unflatten(replaced(static, slots, given[count:]))
        out, after = call(given[:count], x, args, kwargs)
        if not is_array(out):
            raise TypeError(f"{name} returned a {type(out).__name__}, but must return one array of shape {shape}")
        if out.shape != shape or not is_inexact(out):
            raise ValueError(f"{name} returned {out.dtype}{out.shape}, but is added to a stream: it must return floats of shape {shape}")
        if real and jnp.iscomplexobj(out):
            raise TypeError(f"{name} returned {out.dtype}, but is added to a real stream: give complex streams, or what is real of it")
        return out, [*after, *given[count:]]

    return with_extra


def _take_apart(fn: Any, name: str, arrays: Arrays) -> tuple[list[int], Call]:
    if isinstance(fn, nnx.Module):
        return _take_module_apart(fn, name, arrays)
    if not callable(fn):
        raise TypeError(f"{name} is a {type(fn).__name__}, but must be a function of one array or an nnx.Module")
    values, rebuild = hoist(fn, name)

    def call(given: list[Any], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        made = rebuild(given)
        modules = list(_modules_in(made, set()))
        before = jax.tree.leaves(modules)
        out = made(x, *args, **kwargs)
        after = jax.tree.leaves(modules)
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            raise TypeError(
                f"{name} is a function that calls a module whose state changes, such as that of dropout: give the module itself, "
                "whose state can be restored"
            )
        return out, given

    return [arrays.place(v) for v in values], call


def _take_module_apart(module: nnx.Module, name: str, arrays: Arrays) -> tuple[list[int], Call]:
    graph, state = nnx.split(module)
    tree = jax.tree.structure(state)
    variables = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)}
    indices = []
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        indices.append(arrays.place(value, variables.get(path)))

    def call(given: list[Any], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        copy = nnx.merge(graph, tree.unflatten(given))
        out = copy(x, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        after = nnx.split(copy)[1]
        if jax.tree.structure(after) != tree:
            raise TypeError(f"{name} adds to its variables when it is called (sow, or created on first use), which is not possible here")
        return out, jax.tree.leaves(after)

    return indices, call


def _modules_in(fn: Any, visited: set[int]) -> Any:
    """The modules that a function holds, in closures, defaults, partial arguments, as `self`."""
    if id(fn) in visited:
        return
    visited.add(id(fn))
    if isinstance(fn, nnx.Module):
        yield fn
        return
    for part in jax.tree.leaves(parts_of(fn)[0], is_leaf=lambda x: isinstance(x, nnx.Module)):
        yield from _modules_in(part, visited)


def _refuse_streams_of_keys(who: str, given: Any) -> None:
    kinds = (nnx.Rngs, nnx.RngStream)
    if any(isinstance(x, kinds) for x in jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, kinds))):
        raise TypeError(f"{who}: rngs are given to the call, but would be the same in every coupling: give them to the modules when these are made")
