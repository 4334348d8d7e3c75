"""The reversible stack of Linen modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from layers.linen.apart import AXIS, Apart
from layers.reversible.reversible_stack import ReconstructionError
from layers.reversible.reversible_stack import ReversibleStack as _ReversibleStack

Pair = tuple[linen.Module, linen.Module]


class ReversibleStack(linen.Module):
    """Couplings y1 = x1 + f(x2), y2 = x2 + g(y1), one after another, in memory that does not grow with their number: `layers.ReversibleStack`.

    In a stack that is not a loop XLA keeps the random bits of Flax's Dropout for each coupling: take `layers.linen.Dropout`.

    Attributes:
        blocks: a function that makes a pair (f, g) of Linen modules, called `depth` times; their variables are under `f_0`, `g_0`, `f_1`, ...
            Or a sequence of such pairs, with Linen's names for modules in an attribute, `blocks_0_0`, ... Each module takes an array of the
            shape of one half of the input and returns one of the shape of the other. It may write mutable collections: running statistics,
            or what it sows, such as an auxiliary loss, which is differentiated as well.
        depth: the number of pairs to make.
        scan: whether to make one pair, under `f` and `g`, whose variables have a first axis of length `depth`, and to run a loop.
        axis, stream_dtype, exact, headroom: as in `layers.ReversibleStack`.

    Raises:
        ValueError: where `depth` is missing or wrong, or with `scan` where `blocks` is no function.
        TypeError: where a block is not a pair of Linen modules.
    """

    blocks: Sequence[Pair] | Callable[[], Pair]
    _: KW_ONLY
    depth: int | None = None
    scan: bool = False
    axis: int = -1
    stream_dtype: Any = None
    exact: bool = False
    headroom: float = 256.0

    def setup(self) -> None:
        pairs = self._made()
        for i, pair in enumerate(pairs):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(m, linen.Module) for m in pair)):
                raise TypeError(f"ReversibleStack: block {i} is {type(pair).__name__}, but must be a pair (f, g) of Linen modules")
        if callable(self.blocks) and pairs:
            self.f, self.g = pairs[0] if self.scan else ([f for f, _ in pairs], [g for _, g in pairs])

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the stack: arguments and result as of `layers.ReversibleStack`."""
        twin, parts = self._twin(x, args, kwargs)
        y = twin(x, *args, **kwargs)
        for module, part in parts:
            part.write(module)
        return y

    def reconstruction_error(self, x: Any, *args: Any, **kwargs: Any) -> ReconstructionError:
        """How far from `x` the backward pass arrives, as of `layers.ReversibleStack`."""
        return self._twin(x, args, kwargs)[0].reconstruction_error(x, *args, **kwargs)

    @linen.nowrap
    def _made(self) -> list[Any]:
        """The pairs of a sequence; or new ones, a single one for a loop."""
        blocks, depth = self.blocks, self.depth
        if callable(blocks):
            if depth is None or depth < 0:
                raise ValueError(f"ReversibleStack: blocks is a function, so give depth (now {depth})")
            return [blocks() for _ in range(min(depth, 1) if self.scan else depth)]
        if self.scan:
            raise ValueError("ReversibleStack: scan=True makes a single pair of modules: give blocks as a function that makes it, and depth")
        if depth not in (None, len(blocks)):
            raise ValueError(f"ReversibleStack: depth is {depth}, but there are {len(blocks)} blocks; leave depth out")
        return list(blocks)

    @linen.nowrap
    def _pairs(self) -> list[Pair]:
        if not callable(self.blocks):
            return list(self.blocks)
        own: Any = self
        return [] if not self.depth else [(own.f, own.g)] if self.scan else list(zip(own.f, own.g, strict=True))

    @linen.nowrap
    def _twin(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_ReversibleStack, list[tuple[linen.Module, Apart]]]:
        """The nnx stack, and the modules that it is made of, with what stands for them there."""
        pairs, length = self._pairs(), self.depth if self.scan else None
        options: dict[str, Any] = {n: getattr(self, n) for n in ("axis", "stream_dtype", "exact", "headroom")}
        _ReversibleStack([], **options)(x)  # refuses an x that has no halves
        halves = [jnp.asarray(h) for h in (x if isinstance(x, tuple) else jnp.split(jnp.asarray(x), 2, self.axis))]
        initializing = self.is_initializing()
        if initializing and pairs:
            self._initialize(pairs, halves, args, kwargs)
        parts: dict[int, tuple[linen.Module, Apart]] = {}
        for k, module in enumerate(m for pair in pairs for m in pair):
            if id(module) in parts:
                parts[id(module)][1].refuse_to_sow()
            else:
                example = None if initializing else ((halves[1 - k % 2], *args), kwargs)
                parts[id(module)] = module, Apart("ReversibleStack", module, length, example)
        twin = _ReversibleStack([(parts[id(f)][1], parts[id(g)][1]) for f, g in pairs], **options)
        if length:
            twin.depth, twin.scan, twin.f, twin.g = length, True, *(parts[id(m)][1] for m in pairs[0])
        return twin, list(parts.values())

    @linen.nowrap
    def _initialize(self, pairs: list[Pair], halves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def couple(pair: Pair, x1: Any, x2: Any) -> tuple[Any, Any]:
            x1 = _plus(x1, pair[0](x2, *args, **kwargs))
            return x1, _plus(x2, pair[1](x1, *args, **kwargs))

        if self.scan:
            body = lambda module, halves, _: (couple((module.f, module.g), *halves), None)
            linen.scan(body, {True: 0}, split_rngs={True: True}, length=self.depth, metadata_params=AXIS)(self, tuple(halves), None)
        else:
            for pair in pairs:
                halves = list(couple(pair, *halves))


def _plus(x: jax.Array, change: Any) -> jax.Array:
    """The sum, in the dtype of `x`; `x` where there is none, which the coupling refuses."""
    return x + change.astype(x.dtype) if getattr(change, "shape", None) == x.shape else x
