"""Recurrences whose chunks of time are products of matrices: one after the other on a CPU, on an accelerator many at once.

A layer gives the body, which takes the state before a span of successive chunks to that after it, and its rows to the output. Only the state goes
from chunk to chunk, and from span to span. On a CPU a span is one chunk, whose arrays stay in a core's cache; on an accelerator it has as many chunks
as a budget of memory allows: what needs no state is done for all of them together.

Backward takes the spans from the last to the first, computes each again from the state it starts from, and pulls the gradients of its output and of
the state after it back through it. Kept from forward are the arguments and the state at the start of each span; where there is
one full span, that of the rest alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.machine import on_accelerator
from layers.core.numerics import wide
from layers.core.sharding import sharded_as
from layers.recurrent.halves import Runs
from layers.recurrent.loops import fold_chunks, scan, with_first, without_first

SPAN_BYTES = 1 << 30
"""Of what is alive at once for one span on an accelerator."""


@dataclass(frozen=True)
class Chunks:
    """How time is cut.

    Attributes:
        chunk: steps in a chunk, a power of 2.
        span: steps in a span, some chunks.
    """

    chunk: int
    span: int

    @staticmethod
    def of(chunk: int, length: int, step_bytes: int) -> Chunks:
        """About equal spans of the chunks of `length` steps, of which each takes so many bytes in backward."""
        if not on_accelerator():
            return Chunks(chunk, chunk)
        count = -(-length // chunk)
        spans = -(-count // max(1, SPAN_BYTES // max(step_bytes * chunk, 1)))
        return Chunks(chunk, chunk * -(-count // max(spans, 1)) if count else chunk)

    def chunk_of(self, size: int) -> int:
        """Steps in the chunks of a span of this size: a shorter span than a chunk is one of the next power of 2."""
        return min(self.chunk, 1 << max(size - 1, 0).bit_length())


Body = Callable[[jax.Array, Any, tuple[Any, ...], Runs | None, int], tuple[jax.Array, jax.Array]]
"""`(state, parameters, rows, runs, chunk) -> (state, out)`, rows and out (batch, time, ...) of one span, in the dtype of the state."""


def run_chunks(
    body: Body, parameters: Any, rows: tuple[Any, ...], runs: Any, state: jax.Array, like: jax.Array, chunks: Chunks
) -> tuple[jax.Array, jax.Array, Any]:
    """The output of all steps, of the shape and dtype of `like`, the last state, and the states at the start of spans that `pull_chunks` needs.

    Args:
        body: of a span.
        parameters: a pytree of arrays that all steps share, in the dtype of the state.
        rows: arrays (batch, time, ...), or None.
        runs: the numbers of packed sequences, (batch, time), or None.
        state: before the first step, float32 or wider.
        like: an array of the shape and dtype of the output, for its axes along a mesh.
        chunks: how time is cut.
    """

    def step(carry: Any, start: Any, size: int, _: Any) -> Any:
        state, out = carry
        chunk = chunks.chunk_of(size)
        after, y = body(state, parameters, cut_rows(rows, start, size, state.dtype), Runs.at(runs, start, size, chunk), chunk)
        return (after, put_rows(out, y, start)), state

    carry = state, sharded_as(jnp.zeros_like(like), like)
    (state, out), starts = fold_chunks(step, carry, like.shape[1], chunks.span, beside=(rows, state, parameters, runs))
    return out, state, without_first(starts)


def pull_chunks(
    body: Body, parameters: Any, rows: tuple[Any, ...], runs: Any, state: jax.Array, starts: Any, dout: jax.Array, dlast: jax.Array, chunks: Chunks
) -> tuple[jax.Array, Any, tuple[Any, ...]]:
    """The gradients of the first state, of the parameters and of the rows, from those of the output and of the last state."""
    starts = with_first(starts, state, dout.shape[1], chunks.span)

    def step(carry: Any, start: Any, size: int, state: jax.Array) -> Any:
        dstate, sums, buffers = carry
        chunk = chunks.chunk_of(size)
        at = Runs.at(runs, start, size, chunk)
        pull = jax.vjp(lambda s, p, r: body(s, p, r, at, chunk), state, parameters, cut_rows(rows, start, size, state.dtype))[1]
        dstate, dparameters, grads = pull((dstate, cut_rows(dout, start, size, state.dtype)))
        return (dstate, jax.tree.map(jnp.add, sums, dparameters), jax.tree.map(lambda into, x: put_rows(into, x, start), buffers, grads)), None

    carry = dlast, jax.tree.map(jnp.zeros_like, parameters), jax.tree.map(lambda x: sharded_as(jnp.zeros_like(x), x), rows)
    beside = rows, dout, parameters, runs
    return fold_chunks(step, carry, dout.shape[1], chunks.span, starts, reverse=True, beside=beside)[0]


def first_state(initial: Any, k: jax.Array, v: jax.Array) -> jax.Array:
    """The state before the first step, (batch, heads, features of k, features of v): zeros where none is given."""
    dtype = wide(k.dtype)
    batch, _, heads, features = k.shape
    return sharded_as(jnp.zeros((batch, heads, features, v.shape[3]), dtype), k.sum(1)) if initial is None else initial.astype(dtype)


def over_chunks(step: Callable[..., tuple[Any, Any]], state: jax.Array, xs: Any) -> tuple[Any, Any]:
    """Folds `step` over the chunks of a span: arrays (batch, heads, chunks, ...), and the results as well."""
    first = lambda tree: jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), tree)
    if jax.tree.leaves(xs)[0].shape[2] == 1:
        state, ys = step(state, jax.tree.map(lambda x: x[:, :, 0], xs))
        return state, jax.tree.map(lambda y: y[:, :, None], ys)
    state, ys = scan(step, state, first(xs), beside=xs)
    return state, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2), ys)


def cut_rows(tree: Any, start: Any, size: int, dtype: Any) -> Any:
    """`size` steps of arrays (batch, time, ...)."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, 1).astype(dtype), tree)


def put_rows(into: jax.Array, x: jax.Array, start: Any) -> jax.Array:
    """`into`, (batch, time, ...), with some steps put in."""
    return lax.dynamic_update_slice_in_dim(into, x.astype(into.dtype), start, 1)
