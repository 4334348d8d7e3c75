"""What the gated recurrent layers share: time in order and in chunks, products that add up wide, states that are held over padding.

Inside a rule, time is the first axis and steps come in the order in which they are run. A chunk is a group of successive steps, all of whose
gates are computed by one matrix product: it bounds what is alive at once, and keeps the sum over time of a weight's gradient in one product.
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

from layers.core.blocks import block_size
from layers.core.numerics import wide
from layers.recurrent.loops import scan

CHUNK_BYTES = 1 << 23
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
        """The plan with chunks of a size that suits the caches."""
        target = CHUNK_BYTES // max(4 * batch * gates, 1)
        return Plan(steps=block_size(time, min(max(target, 16), 128)), **options)

    def run_order(self, x: jax.Array) -> jax.Array:
        """(time, batch, features) in the order of the run, from the order of the arguments."""
        x = x if self.time_major else jnp.moveaxis(x, 1, 0)
        return jnp.flip(x, 0) if self.reverse else x

    def given_order(self, x: jax.Array) -> jax.Array:
        """The inverse of `run_order`."""
        x = jnp.flip(x, 0) if self.reverse else x
        return x if self.time_major else jnp.moveaxis(x, 0, 1)

    def keep(self, lengths: Any, time: int) -> Any:
        """(time, batch, 1) in the order of the run: whether a step lies within its sequence; None where all do."""
        if lengths is None:
            return None
        step = jnp.arange(time)[:, None, None]
        return (jnp.flip(step, 0) if self.reverse else step) < lengths[:, None]

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
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=wide(kernel.dtype))


def summed_product(x: jax.Array, da: jax.Array, like: jax.Array) -> jax.Array:
    """Σ xᵀ da over time and batch: the gradient of a kernel `like` this one, float32 or wider.

    In up to four parts of the time, added at the end: the rounding error of a sum in one go grows with its length.
    """
    x, da, size = x.astype(like.dtype), da.astype(like.dtype), x.shape[0] // math.gcd(x.shape[0], 4)
    both = (((0, 1), (0, 1)), ((), ()))
    parts = [(x[t : t + size], da[t : t + size]) for t in range(0, x.shape[0], size)]
    return functools.reduce(jnp.add, (lax.dot_general(*p, both, preferred_element_type=wide(like.dtype)) for p in parts))


def zero_sums(parameters: Sequence[Any], wanted: Sequence[bool]) -> tuple[Any, ...]:
    """Where the sums of the gradients of `parameters` start; None for one that is not wanted."""
    return tuple(jnp.zeros(p.shape, wide(p.dtype)) if w else None for p, w in zip(parameters, wanted, strict=True))


def add_wanted(sums: tuple[Any, ...], terms: Sequence[Callable[[], jax.Array]]) -> tuple[Any, ...]:
    """Every sum with its term added, which is computed only where there is a sum."""
    return tuple(None if s is None else s + term().astype(s.dtype) for s, term in zip(sums, terms, strict=True))


def add_bias(z: jax.Array, bias: Any) -> jax.Array:
    return z if bias is None else z + bias.astype(z.dtype)


def before(start: jax.Array, states: jax.Array) -> jax.Array:
    """The state before each step, from that before the first one and those after each."""
    return jnp.concatenate([start[None].astype(states.dtype), states[:-1]])


def scan_chunks(
    body: Callable[..., tuple[Any, Any]], carry: Any, rows: Any, starts: Any = None, *, steps: int, reverse: bool = False
) -> tuple[Any, Any]:
    """Folds `body` over chunks of time.

    Args:
        body: `(carry, rows, start) -> (carry, outs)` with the rows of one chunk, and what `starts` has for it with a first axis of 1.
        carry: where it starts.
        rows: a pytree of arrays with time as first axis.
        starts: a pytree of arrays with one entry a chunk.
        steps: in a chunk; the last one may have fewer.
        reverse: whether the last chunk comes first.

    Returns:
        The last carry, and `outs` of all chunks one after the other.
    """
    time = jax.tree.leaves(rows)[0].shape[0]
    full = time // steps
    chunks = jax.tree.map(lambda x: x[: full * steps].reshape(full, steps, *x.shape[1:]), rows)
    rest = jax.tree.map(lambda x: x[full * steps :], rows)
    chunk_starts, rest_start = jax.tree.map(lambda x: x[:full, None], starts), jax.tree.map(lambda x: x[full:], starts)
    outs: list[Any] = []

    def run_rest(carry: Any) -> Any:
        carry, out = body(carry, rest, rest_start)
        outs.append(out)
        return carry

    ragged = full * steps < time
    carry = run_rest(carry) if ragged and reverse else carry
    if full:
        carry, out = scan(lambda c, now: body(c, *now), carry, (chunks, chunk_starts), reverse=reverse)
        outs.insert(0, jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), out))
    carry = run_rest(carry) if ragged and not reverse else carry
    return carry, outs[0] if len(outs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
