"""A stack of reversible residual blocks as a Flax module. Mathematics and what is saved: `reversible_coupling`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.core import checks
from layers.core.trees import is_inexact
from layers.reversible.chain import Chain, StreamPair
from layers.reversible.halves import Arrays, make_chain
from layers.reversible.reversible_coupling import ReversibleCouplingFunction, as_stream, make_streams
from layers.reversible.stacking import stacked

Pair = tuple[nnx.Module, nnx.Module]


@dataclass(frozen=True)
class ReconstructionError:
    """How far the input that the backward pass arrives at is from the true one.

    Attributes:
        absolute: the largest difference.
        relative: the same as a share of the largest magnitude of the input.
    """

    absolute: float
    relative: float


class ReversibleStack(nnx.Module):
    """Couplings y1 = x1 + f(x2), y2 = x2 + g(y1), one after another, in memory that does not grow with their number.

    Args:
        blocks: pairs (f, g) of modules; or a function that makes such a pair from an `nnx.Rngs`, called `depth` times. Each module takes
            an array of the shape of one half of the input and returns one of the shape of the other. It may write state when it is called,
            such as running statistics or an auxiliary loss; what reads that after the call is differentiated as well.
        depth: the number of pairs to make.
        scan: whether to keep the variables of all couplings stacked along a first axis, and to run them as a loop, compiled once.
            They must then be alike. The values are those of the unrolled stack.
        axis: along which the input is split in two halves.
        stream_dtype, exact, headroom: as in `reversible_coupling`.
        rngs: given to the function that makes pairs.

    Raises:
        ValueError: where `depth` or `rngs` is missing, or the pairs cannot be stacked.
        TypeError: where a block is not a pair of modules.
    """

    def __init__(
        self,
        blocks: Sequence[Pair] | Callable[[nnx.Rngs], Pair],
        *,
        depth: int | None = None,
        scan: bool = False,
        axis: int = -1,
        stream_dtype: Any = None,
        exact: bool = False,
        headroom: float = 256.0,
        rngs: nnx.Rngs | None = None,
    ):
        pairs = _made(blocks, depth, rngs)
        self.depth, self.axis = len(pairs), checks.integer("ReversibleStack", "axis", axis)
        self.scan = checks.flag("ReversibleStack", "scan", scan) and bool(pairs)
        self.streams = make_streams("ReversibleStack", stream_dtype, exact, headroom)
        columns: list[list[Any]] = [list(column) for column in zip(*pairs, strict=True)] or [[], []]
        self.f, self.g = (_kept(c, self.scan) for c in columns)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the stack.

        Args:
            x: an array that is split in two along `axis`, or the two halves as a tuple.
            *args, **kwargs: go to every f and g after its array; arrays among them are differentiated.

        Returns:
            An array of the shape and dtype of `x`, or a tuple of two such.

        Raises:
            ValueError: where `x` cannot be halved, or a module returns another shape than the half that it is added to has.
            TypeError: where `x` is not of arrays of floating-point dtype.
        """
        chain, arrays, (x1, x2) = self._chain(x, args, kwargs)
        y1, y2, changed = ReversibleCouplingFunction.apply(chain, x1, x2, *arrays.values)
        arrays.write(changed)
        return (y1, y2) if isinstance(x, tuple) else jnp.concatenate([y1, y2], self.axis)

    def reconstruction_error(self, x: Any, *args: Any, **kwargs: Any) -> ReconstructionError:
        """Runs the stack forwards and backwards, as a gradient does, and compares where it arrives with `x`.

        Args:
            x, *args, **kwargs: as in a call. Nothing of the module changes.
        """
        chain, arrays, halves = self._chain(x, args, kwargs)
        found, _ = jax.jit(lambda halves, arrays: _there_and_back(chain, halves, arrays))(halves, arrays.values)
        absolute = max((float(e) for e, _ in found), default=0.0)
        largest = max((float(m) for _, m in found), default=0.0)
        return ReconstructionError(absolute, absolute / largest if largest else absolute)

    def _chain(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Chain, Arrays, tuple[jax.Array, jax.Array]]:
        halves = x if isinstance(x, tuple) and len(x) == 2 else self._halved(x)
        x1, x2 = (as_stream("ReversibleStack", "x", h, self.streams) for h in halves)
        pairs: list[tuple[Any, Any]] = [(self.f, self.g)] if self.scan else list(zip(self.f, self.g, strict=True))
        length = self.depth if self.scan else None
        chain, arrays = make_chain("ReversibleStack", pairs, x1, x2, args, kwargs, streams=self.streams, length=length)
        return chain, arrays, (x1, x2)

    def _halved(self, x: Any) -> list[jax.Array]:
        x = as_stream("ReversibleStack", "x", x, self.streams)
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] % 2:
            raise ValueError(
                f"ReversibleStack: x has shape {x.shape}, which has no two halves along axis {self.axis}; make it even or give a tuple (x1, x2)"
            )
        return jnp.split(x, 2, self.axis)


def _made(blocks: Any, depth: int | None, rngs: nnx.Rngs | None) -> list[Pair]:
    depth = checks.integer("ReversibleStack", "depth", depth, "[0, 1000000]", optional=True)
    if callable(blocks):
        if depth is None or rngs is None:
            raise ValueError(f"ReversibleStack: blocks is a function, so give depth (now {depth}) and rngs (now {rngs})")
        blocks = [blocks(rngs) for _ in range(depth)]
    elif isinstance(blocks, (str, bytes, dict)) or not hasattr(blocks, "__len__"):
        raise TypeError(f"ReversibleStack: blocks is {checks.shown(blocks)}, but must be a sequence of pairs, or a function that makes one")
    elif depth not in (None, len(blocks)):
        raise ValueError(f"ReversibleStack: depth is {depth}, but there are {len(blocks)} blocks; leave depth out")
    for i, pair in enumerate(blocks):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(m, nnx.Module) for m in pair)):
            raise TypeError(f"ReversibleStack: block {i} is {type(pair).__name__}, but must be a pair (f, g) of nnx modules")
    return [(f, g) for f, g in blocks]


def _kept(modules: list[Any], scan: bool) -> Any:
    return stacked(modules) if scan else nnx.List(modules)


def _there_and_back(chain: Chain, halves: tuple[Any, Any], arrays: list[Any]) -> Any:
    """For each half the largest difference and the largest magnitude; and the gradients, so that they are computed."""
    streams = chain.streams
    start = StreamPair(*streams.enter(*halves))
    y, seen, _ = chain.advance(arrays, start)
    dy = StreamPair(*(jnp.ones_like(streams.read(stream)) for stream in y))
    wanted = [is_inexact(a) for a in arrays]
    end, dx, grads = chain.retreat(arrays, seen, y, dy, {}, wanted)
    pairs = [(streams.read(a), streams.read(b)) for a, b in zip(start, end, strict=True)]
    return [(jnp.max(jnp.abs(a - b), initial=0), jnp.max(jnp.abs(a), initial=0)) for a, b in pairs], (dx, grads)
