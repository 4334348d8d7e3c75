"""A `Function`'s own `vmap` rule, in place of the one that JAX derives."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.core.arguments import take_apart


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
        in_dims, _ = template.fill([0 if b else None for b in in_batched])
        given = cls.vmap(VmapInfo(size), tuple(in_dims), *args, **kwargs)
        if not isinstance(given, tuple) or len(given) != 2:
            raise TypeError(f"{cls.__name__}.vmap must return (output, out_dims), but returned {type(given).__name__}")
        output, out_dims = given
        outputs = take_output(output)
        dims = jax.tree.leaves(_spread(cls.__name__, out_dims, output), is_leaf=lambda d: d is None)
        outputs = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(outputs, dims, strict=True)]
        return outputs, [d is not None for d in dims]

    mapped = jax.custom_batching.custom_vmap(plain)
    mapped.def_vmap(batched)
    whole = jax.custom_jvp(lambda *arrays: mapped(*arrays))
    whole.defjvp(lambda primals, tangents: (whole(*primals), jax.jvp(plain, primals, tangents)[1]))
    outputs = whole(*arrays)
    return filled[0](outputs)


def _spread(name: str, dims: Any, output: Any) -> Any:
    """One batch axis for each array of the output, from a prefix of its structure."""
    try:
        return jax.tree.map(lambda d, part: jax.tree.map(lambda _: d, part), dims, output, is_leaf=lambda d: d is None)
    except ValueError:
        raise TypeError(f"{name}.vmap returned out_dims={dims}, which does not have the structure of its output") from None
