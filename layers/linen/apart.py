"""Linen modules inside nnx modules: called as pure functions of their variables and random keys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import meta

AXIS = {meta.PARTITION_NAME: None}
"""The axis of couplings has no name in the metadata of variables."""


@dataclass(frozen=True, eq=False)
class _Call:
    """How a Linen module is called with variables that stand in a list.

    Attributes:
        module: unbound.
        mutable: which collections a call may write.
        given: the structure of the variables that a call takes, the first ones of the list.
        indices: where each variable is in the list, by its path.
        written: the structure of the collections that a call writes, and the paths of the variables there.
    """

    module: linen.Module
    mutable: Any
    given: Any
    indices: dict[Any, int]
    written: tuple[Any, list[Any]]


class Apart(nnx.Module):
    """A bound Linen module as an nnx module: its state are variables and random keys, and a call applies an unbound copy to them.

    Args:
        who: for messages.
        bound: the module.
        length: of the first axis of all variables; None where there is none.
        example: `(args, kwargs)` of a call, which shows what a call writes; None where that is forgotten.
    """

    def __init__(self, who: str, bound: linen.Module, length: int | None = None, example: Any = None):
        scope: Any = bound.scope
        _refuse_others(who, bound, scope.path)
        module, variables = bound.unbind()
        variables = variables if length is None else meta.remove_axis(variables, 0, AXIS)
        keys = {name: bound.make_rng(name) for name in scope.rngs}
        keys = keys if length is None else {name: jax.random.split(key, length) for name, key in keys.items()}
        mutable = () if scope.mutable is False else scope.mutable

        def written() -> Any:
            first = (variables, keys) if length is None else jax.tree.map(lambda a: a[0], (variables, keys))
            return module.apply(first[0], *example[0], rngs=first[1], mutable=mutable, **example[1])[1]

        found, given = jax.tree_util.tree_flatten_with_path(variables)
        after, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(written) if example and mutable else {})
        old = {path for path, _ in found}
        created = [(path, jnp.zeros((*([] if length is None else [length]), *v.shape), v.dtype)) for path, v in after if path not in old]
        indices = {path: i for i, (path, _) in enumerate(found + created)}
        self.call, self.length = _Call(module, mutable, given, indices, (structure, [path for path, _ in after])), length
        self.values = nnx.List([nnx.Variable(jnp.asarray(v)) for _, v in found + created])
        self.keys = nnx.Dict({name: nnx.Variable(key) for name, key in keys.items()})
        self.calls = nnx.Variable(jnp.zeros(() if length is None else length, jnp.uint32))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, calls = self.call, self.calls.get_raw_value()
        variables = call.given.unflatten([v.get_raw_value() for v in self.values[: call.given.num_leaves]])
        rngs = {name: jax.random.fold_in(key.get_raw_value(), calls) for name, key in self.keys.items()}
        out, written = call.module.apply(variables, *args, rngs=rngs, mutable=call.mutable, **kwargs)
        if rngs:
            self.calls.set_value(calls + 1)
        for path, value in jax.tree_util.tree_leaves_with_path(written):
            variable = self.values[call.indices[path]] if path in call.indices else None
            if variable is not None and value is not variable.get_raw_value():
                variable.set_value(value)
        return out

    def refuse_to_sow(self) -> None:
        """Raises where a call creates variables."""
        if len(self.values) > self.call.given.num_leaves:
            raise TypeError(
                "ReversibleStack: a module that several couplings share creates variables when it is called (sow), which would be one for all of "
                "them: give each coupling a module of its own, or leave that collection out of `mutable`"
            )

    def write(self, bound: linen.Module) -> None:
        """Gives the module what calls have written."""
        structure, paths = self.call.written
        written = structure.unflatten([self.values[self.call.indices[path]].get_raw_value() for path in paths])
        for collection, values in (written if self.length is None else meta.add_axis(written, 0, AXIS)).items():
            for name, value in values.items():
                bound.put_variable(collection, name, value)


def _refuse_others(who: str, module: linen.Module, path: tuple[str, ...]) -> None:
    """Raises where a module holds one whose variables are not among its own."""
    held = [getattr(module, f.name) for f in fields(module) if f.init and f.name != "parent"]
    for other in (m for m in jax.tree.leaves(held) if isinstance(m, linen.Module)):
        where = getattr(other.scope, "path", path)
        if where[: len(path)] != path:
            raise ValueError(
                f"{who}: the module {'/'.join(path)} holds {'/'.join(where)}, which belongs to the module that made it: make it in that module's "
                "`setup`, or with `parent=None`; parameters that it shares with others have no gradient here"
            )
        _refuse_others(who, other, path)
