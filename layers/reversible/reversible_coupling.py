"""A chain of additive couplings whose backward pass computes the activations again from the output.

    y1 = x1 + f(x2),   y2 = x2 + g(y1)

Undone, with the gradients that arrive at y1 and y2 on their way:

    dy1 += (∂g/∂y1)ᵀ dy2,   x2 = y2 - g(y1)
    dx2 = dy2 + (∂f/∂x2)ᵀ dy1,   x1 = y1 - f(x2),   dx1 = dy1

and each half gives the gradient of its parameters from the same evaluation of f or g. The next coupling's y is this one's x. Where a half
writes state s, such as an auxiliary loss, and something reads it afterwards, its gradient joins that of the half's output:

    dy1 += (∂g/∂y1)ᵀ dy2 + (∂s/∂y1)ᵀ ds

Saved: the two streams at the end of the chain and the arguments, whatever the length; of state that the halves change, such as the counts
of random streams, the values that each of them saw, so that the same masks are drawn again. The price is one more evaluation of f and g.

Reference: Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations", 2017; Dinh et al., "NICE", 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.core import checks, compat
from layers.core.trees import is_array, is_inexact
from layers.function.function import Function
from layers.reversible.chain import Chain, Half, StreamPair
from layers.reversible.halves import make_chain
from layers.reversible.streams import Streams


class ReversibleCouplingFunction(Function):
    @staticmethod
    def forward(ctx, chain, x1, x2, *arrays):
        chain = replace(chain, dtypes=(x1.dtype, x2.dtype))
        y, seen, changed = chain.advance(arrays, StreamPair(*chain.streams.enter(x1, x2)))
        ctx.chain, ctx.y, ctx.seen, ctx.arrays = chain, y, seen, arrays
        ctx.set_materialize_grads(False)
        return chain.streams.leave(y.first, x1.dtype), chain.streams.leave(y.second, x2.dtype), changed

    @staticmethod
    def backward(ctx, dy1, dy2, dchanged):
        chain, y = ctx.chain, ctx.y
        dy = StreamPair(chain.streams.gradient(y.first, dy1), chain.streams.gradient(y.second, dy2))
        dstate = {i: d for i, d in dchanged.items() if d is not None}
        start = chain.retreat(ctx.arrays, ctx.seen, y, dy, dstate, ctx.needs_input_grad[3:])
        return None, *start.dx, *start.arrays

    @staticmethod
    def jvp(ctx, _, x1_dot, x2_dot, *arrays_dot):
        chain = ctx.chain
        streams, arrays = chain.streams, list(ctx.arrays)
        x1, x2 = chain.retreat(arrays, ctx.seen, ctx.y, None, {}, ()).x
        differentiated = [i for i, a in enumerate(arrays) if is_inexact(a)]

        def outputs(x1_smooth: Any, x2_smooth: Any, moved: list[Any]) -> Any:
            now = dict(enumerate(arrays)) | dict(zip(differentiated, moved, strict=True))
            y, _, changed = chain.advance(list(now.values()), StreamPair(streams.follow(x1, x1_smooth), streams.follow(x2, x2_smooth)))
            return (streams.read(y.first), streams.read(y.second), {i: x for i, x in changed.items() if is_inexact(x)}), dict.fromkeys(changed)

        at = (streams.read(x1), streams.read(x2), [arrays[i] for i in differentiated])
        given = (x1_dot, x2_dot, [arrays_dot[i] for i in differentiated])
        towards = jax.tree.map(lambda x, t: compat.zeros(jax.typeof(x)) if t is None else t.astype(x.dtype), at, given)
        _, (y1_dot, y2_dot, changed_dot), absent = jax.jvp(outputs, at, towards, has_aux=True)
        return y1_dot, y2_dot, absent | changed_dot

    @staticmethod
    def example(key, dtype):
        f = Half(lambda arrays, x: (arrays[0] * jnp.sin(x), [arrays[0], arrays[0] * (arrays[1] + x[0])]), (0, 1), "f")
        g = Half(lambda arrays, x: (arrays[0] * arrays[1] * x, arrays), (0, 2), "g")
        chain = Chain(((f, g),), Streams(), stacked=2, length=3)
        shapes = ((2, 4), (2, 4), (3, 4), (3, 4), (4,))
        x1, x2, w, state, v = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 5), shapes, strict=True))
        return chain, x1, x2, w, state, v

    @staticmethod
    def examples(key, dtype):
        chain, x1, x2, *arrays = ReversibleCouplingFunction.example(key, dtype)
        (f, g), flat = chain.couplings[0], [a[0] if a.ndim == 2 else a for a in arrays]
        unrolled = Chain(((f, g), (replace(f, indices=(0, 3)), g)), Streams())  # each with state of its own
        return {
            "unrolled": (unrolled, x1, x2, *flat, 2 * flat[1]),
            "zeros": (chain, 0 * x1, 0 * x2, *arrays),
            "in fixed point": (replace(chain, streams=Streams(exact=True)), x1, x2, *arrays),
        }


def reversible_coupling(
    f: Callable[..., Any] | Sequence[Callable[..., Any]],
    g: Callable[..., Any] | Sequence[Callable[..., Any]],
    x1: Float[Array, "*shape1"],
    x2: Float[Array, "*shape2"],
    *args: Any,
    stream_dtype: Any = None,
    exact: bool = False,
    headroom: float = 256.0,
    **kwargs: Any,
) -> tuple[Float[Array, "*shape1"], Float[Array, "*shape2"]]:
    """Adds f(x2) to x1 and then g of that sum to x2, and keeps only the two results for the backward pass.

    With sequences of functions it is a chain of couplings, which keeps the results of the last one, however long it is. (Calls one after
    another keep their results each.)

    Args:
        f: a function, or an `nnx.Module`, from arrays of the shape of `x2` to that of `x1`; or a sequence. What a function closes over is
            differentiated. It must give the same again when it is called again; a module may change its state, as dropout does, and what reads
            that state afterwards, such as an auxiliary loss, is differentiated too.
        g: the same from `x1` to `x2`.
        x1, x2: the two streams.
        *args, **kwargs: go to every f and g after its array.
        stream_dtype: in which the sums are computed and kept; None for that of `x1` and `x2`, or float32 if that is narrower.
        exact: whether sums are in fixed point, integers of 32 bits (64 for float64), so that taking a term away again leaves no rounding error.
        headroom: with `exact`, to how many times the largest magnitude in `x1` and `x2` the streams can grow: beyond it the outputs are NaN.
            At 256 the integers are as fine as float32 is for the largest magnitude.

    Returns:
        y1 and y2, of the shapes and dtypes of `x1` and `x2`.

    Raises:
        ValueError: where f or g returns another shape than the stream that it is added to has, sequences differ in length, or an option is wrong.
        TypeError: where f or g is no function, or is one that calls a module that changes its state; or x1 or x2 is not an array of
            floating-point dtype.
    """
    who = "reversible_coupling"
    fs, gs = (_functions(who, n, h) for n, h in (("f", f), ("g", g)))
    if len(fs) != len(gs):
        raise ValueError(f"{who}: f is a sequence of {len(fs)} and g of {len(gs)}; give as many of both")
    streams = make_streams(who, stream_dtype, exact, headroom)
    x1, x2 = (as_stream(who, n, x, streams) for n, x in (("x1", x1), ("x2", x2)))
    chain, arrays = make_chain(who, list(zip(fs, gs, strict=True)), x1, x2, args, kwargs, streams=streams)
    y1, y2, changed = ReversibleCouplingFunction.apply(chain, x1, x2, *arrays.values)
    arrays.write(changed)
    return y1, y2


def _functions(who: str, what: str, h: Any) -> list[Callable[..., Any]]:
    if callable(h):
        return [h]
    if not isinstance(h, (tuple, list)):
        raise TypeError(f"{who}: {what} is {checks.shown(h)}, but must be a function or module, or a sequence of them")
    return list(h)


def as_stream(who: str, what: str, x: Any, streams: Streams) -> jax.Array:
    """`x` as an array that these streams can carry.

    Raises:
        TypeError: where it is not one, not of a floating-point dtype, or complex and the streams are real.
    """
    if isinstance(x, dict) or (isinstance(x, (list, tuple)) and any(is_array(part) for part in x)):
        raise TypeError(
            f"{who}: {what} is a {type(x).__name__}, but must be one array: concatenate the arrays of a pytree, jax.flatten_util.ravel_pytree"
        )
    x = checks.array(who, what, x, "inexact")
    if jnp.iscomplexobj(x) and (streams.exact or streams.dtype is not None):
        option = "exact=True" if streams.exact else f"stream_dtype={streams.dtype}"
        raise TypeError(
            f"{who}: {what} is of dtype {x.dtype}, but must be real with {option}: leave that out, or give real and imaginary part as two features"
        )
    return x


def make_streams(who: str, dtype: Any, exact: bool, headroom: float) -> Streams:
    """The arithmetic of the streams.

    Raises:
        TypeError: for an option of another type. ValueError: for a dtype that streams cannot have, and a headroom that leaves too few bits.
    """
    dtype, exact = checks.dtype(who, "stream_dtype", dtype, "number"), checks.flag(who, "exact", exact)
    if dtype is not None and (not jnp.issubdtype(dtype, jnp.floating) or (exact and dtype.itemsize < 4)):
        raise ValueError(f"{who}: stream_dtype is {dtype}, but must be {'float32 or float64' if exact else 'of floating point'}")
    return Streams(dtype, exact, checks.number(who, "headroom", headroom, "[1, 65536]"))
