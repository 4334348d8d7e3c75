"""A `Function`'s own `vmap` rule, in place of the one that JAX derives."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.stand_in import stand_in
from layers.function.arguments import ArrayPlace, take_apart
from layers.function.structure import Skeleton


class VmapInfo(NamedTuple):
    """What a `vmap` static method is told: the size of the batch, and torch's `randomness`, here always `"error"`."""

    batch_size: int
    randomness: str = "error"


def forward_with_vmap(cls: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`cls.forward(*args, **kwargs)`, which under `jax.vmap` runs `cls.vmap`; differentiated, it is plain `forward`."""
    arrays: list[Any] = []
    template = take_apart(cls.__name__, "an argument", (args, kwargs), arrays)
    filled: list[Any] = []

    def take_output(output: Any) -> list[Any]:
        outputs: list[Any] = []
        filled[:] = [take_apart(cls.__name__, "an output", output, outputs).fill]
        return outputs

    def plain(*arrays: Any) -> list[Any]:
        args, kwargs = template.fill(arrays)
        return take_output(cls.forward(*args, **kwargs))

    def batched(size: int, in_batched: list[bool], *arrays: Any) -> tuple[list[Any], list[bool]]:
        args, kwargs = template.fill(arrays)
        by_array = [0 if b else None for b in in_batched]
        in_dims = _dims(Skeleton(template.tree, tuple(by_array[x.start] if isinstance(x, ArrayPlace) else None for x in template.leaves)))[0]
        given = cls.vmap(VmapInfo(size), tuple(in_dims), *args, **kwargs)
        if not isinstance(given, tuple) or len(given) != 2:
            raise TypeError(f"{cls.__name__}.vmap must return (output, out_dims), but returned {type(given).__name__}")
        output, out_dims = given
        outputs = take_output(output)
        dims = _spread(cls.__name__, out_dims, output)
        outputs = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(outputs, dims, strict=True)]
        return outputs, [d is not None for d in dims]

    outputs = stand_in(plain, plain, arrays, batched)
    return filled[0](outputs)


def _dims(marked: Skeleton) -> Any:
    """The batch axes of an argument in its structure, one for all of an object of a class that might convert them."""
    kind = marked.kind
    if kind in (tuple, list):
        return kind(map(_dims, marked.children()))
    if kind is dict:
        return dict(zip(marked.keys(), map(_dims, marked.children()), strict=True))
    return marked.marks[0] if len(set(marked.marks)) == 1 else marked.tree.unflatten(marked.marks)


def _spread(name: str, dims: Any, output: Any) -> list[Any]:
    """One batch axis for each leaf of the output, from a prefix of its structure."""
    try:
        given, tree = jax.tree.flatten(dims, is_leaf=lambda d: d is None)
        return [d for d, part in zip(given, tree.flatten_up_to(output), strict=True) for _ in jax.tree.leaves(part)]
    except ValueError:
        raise TypeError(f"{name}.vmap returned out_dims={dims}, which does not have the structure of its output") from None
