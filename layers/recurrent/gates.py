"""What the gated recurrent layers share: time in order and in chunks, products that add up wide, states that are held over padding.

A chunk is a group of successive steps: it bounds what is alive at once, and what needs no loop over steps is one matrix product for all of its
steps. Within a chunk time is the first axis, steps come in the order in which they are run, and each gate has arrays of its own: XLA's CPU
compiler does not vectorise a loop's step that takes an array apart along its last axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from layers.core.blocks import block_size
from layers.core.numerics import dot, wide
from layers.core.sharding import explicit_sharding

CHUNK_BYTES = 1 << 21
"""Of the float32 gates of one chunk."""
SAVES = ("states", "gates")


@dataclass(frozen=True)
class Plan:
    """How a recurrence is run.

    Attributes:
        time_major: whether arrays are (time, batch, features), not (batch, time, features).
        reverse: whether the last step is run first.
        save: "gates" keeps the gates of every step for backward, "states" computes them again.
        steps: in a chunk; the last one may have fewer.
    """

    time_major: bool = False
    reverse: bool = False
    save: str = "states"
    steps: int = 64

    @staticmethod
    def of(time: int, batch: int, gates: int, **options: Any) -> Plan:
        """The plan with chunks of a size that suits the caches, whatever the batch where that is symbolic (`jax.export`)."""
        target = 64 if is_symbolic_dim(batch) else CHUNK_BYTES // max(4 * batch * gates, 1)
        return Plan(steps=block_size(time, min(max(target, 16), 128)), **options)

    def time(self, x: jax.Array) -> int:
        """The steps of `x`."""
        return x.shape[self._axis]

    def cut(self, x: jax.Array, start: Any, size: int) -> jax.Array:
        """The chunk of `size` steps from step `start` of the run on, (time, batch, features)."""
        x = lax.dynamic_slice_in_dim(x, self._first(x, start, size), size, self._axis)
        x = jnp.moveaxis(x, self._axis, 0)
        return jnp.flip(x, 0) if self.reverse else x

    def put(self, into: jax.Array, x: jax.Array, start: Any) -> jax.Array:
        """`into` with a chunk put in, the inverse of `cut`."""
        first = self._first(into, start, x.shape[0])
        x = jnp.moveaxis(jnp.flip(x, 0) if self.reverse else x, 0, self._axis)
        return lax.dynamic_update_slice_in_dim(into, x.astype(into.dtype), first, self._axis)

    def keep(self, x: jax.Array, lengths: Any, start: Any, size: int) -> Any:
        """(time, batch, 1) of a chunk of `x`: whether a step lies within its sequence; None where all do."""
        if lengths is None:
            return None
        step = self._first(x, start, size) + jnp.arange(size)[:, None, None]
        return (jnp.flip(step, 0) if self.reverse else step) < lengths[:, None]

    def restarts(self, resets: Any, start: Any, size: int) -> Any:
        """(time, batch, 1) of a chunk: whether a packed sequence starts at a step; None where all is one."""
        return None if resets is None else self.cut(resets, start, size)

    @property
    def _axis(self) -> int:
        return 0 if self.time_major else 1

    def _first(self, x: jax.Array, start: Any, size: int) -> Any:
        """Where a chunk of the run lies in `x`."""
        return self.time(x) - start - size if self.reverse else start

    def kept(self, gates: tuple[jax.Array, ...], dtype: Any) -> tuple[jax.Array, ...] | None:
        """What forward keeps of the gates of a step."""
        return tuple(g.astype(dtype) for g in gates) if self.save == "gates" else None


def hold(keep: Any, new: Any, old: Any) -> Any:
    """`new` where the step lies within its sequence, else `old`; pytrees."""
    return new if keep is None else jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)


def visible(x: jax.Array, keep: Any) -> jax.Array:
    """`x` with zeros for padding, so that nothing in it, nan or inf, gets into a sum."""
    return x if keep is None else jnp.where(keep, x, 0)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, of operands of the kernel's dtype, added up in float32 or wider."""
    return dot("...i,io->...o", x.astype(kernel.dtype), kernel)


def gate_products(x: jax.Array, kernel: jax.Array, bias: Any, gates: int) -> list[jax.Array]:
    """`x @ kernel + bias` of each gate."""
    biases = [None] * gates if bias is None else jnp.split(bias, gates)
    return [add_bias(product(x, k), b) for k, b in zip(jnp.split(kernel, gates, -1), biases, strict=True)]


def summed_product(x: jax.Array, da: jax.Array, like: jax.Array) -> jax.Array:
    """Σ xᵀ da over time and batch: the gradient of a kernel `like` this one, float32 or wider.

    In two or four parts of the time, added at the end: the rounding error of a sum in one go grows with its length.
    """
    time, batch = x.shape[:2]
    parts = 1 if is_symbolic_dim(time) else math.gcd(time, 4 if is_symbolic_dim(batch) or time * batch >= 1024 else 2)
    x, da, size = x.astype(like.dtype), da.astype(like.dtype), time // parts
    both = (((0, 1), (0, 1)), ((), ()))
    pieces = [(x[i * size : (i + 1) * size], da[i * size : (i + 1) * size]) for i in range(parts)]
    options: dict[str, Any] = {"preferred_element_type": wide(like.dtype), "out_sharding": explicit_sharding(like)}
    return functools.reduce(jnp.add, (lax.dot_general(*p, both, **options) for p in pieces))


def zero_sums(parameters: Sequence[Any], wanted: Sequence[bool]) -> tuple[Any, ...]:
    """Where the sums of the gradients of `parameters` start; None for one that is not wanted."""
    return tuple(jnp.zeros(p.shape, wide(p.dtype)) if w else None for p, w in zip(parameters, wanted, strict=True))


def add_wanted(sums: tuple[Any, ...], terms: Sequence[Callable[[], jax.Array]]) -> tuple[Any, ...]:
    """Every sum with its term added, which is computed only where there is a sum."""
    return tuple(None if s is None else s + term().astype(s.dtype) for s, term in zip(sums, terms, strict=True))


def add_bias(z: jax.Array, bias: Any) -> jax.Array:
    return z if bias is None else z + bias.astype(z.dtype)
