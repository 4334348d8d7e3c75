"""Dropout whose mask is computed again in backward.

    y = m x / (1 - rate),   m = 1 with probability 1 - rate, else 0
    dx = m dy / (1 - rate)

Saved: the words of the key. The mask is a function of them and of each element's index, so backward computes it again.

With `generator="hash"` the word for index i is two rounds of a 32-bit finaliser, with a word of the mixed key before each:

    mix(mix(i + k0) ^ k1),   m = word < (1 - rate) 2³²

which is elementwise, so that it is computed inside the loop that applies it. It is a hash for masks, not for cryptography.
`generator="threefry"` draws the mask of `jax.random.bernoulli`, that of Flax for the same key.

Reference: Srivastava et al., "Dropout", 2014; the finaliser is that of `core/hashing.py`; Salmon et al., "Parallel Random Numbers: As Easy
as 1, 2, 3", 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import rnglib
from flax.nnx.module import first_from
from jaxtyping import Array, Float

from layers.core import checks
from layers.core.constants import refuse_gradient
from layers.core.hashing import hash_bits, masked, spared
from layers.core.numerics import is_known
from layers.core.recompute import barrier
from layers.function.function import Function

GENERATORS = ("hash", "threefry")


class DropoutFunction(Function):
    @staticmethod
    def forward(ctx, x, words, rate, broadcast_dims, generator):
        ctx.save_for_backward(words)
        ctx.rate, ctx.shape, ctx.generator = rate, tuple(1 if i in broadcast_dims else n for i, n in enumerate(x.shape)), generator
        return masked(x, keep_mask(words, rate, ctx.shape, generator), rate)

    @staticmethod
    def backward(ctx, dy):
        refuse_gradient("dropout", "rate", ctx.needs_input_grad[2])
        (words,), dy = barrier(ctx.saved_tensors, dy)
        return masked(dy, keep_mask(words, ctx.rate, ctx.shape, ctx.generator), ctx.rate), None, None, None, None

    @staticmethod
    def example(key, dtype):
        return jax.random.normal(key, (3, 5, 4), dtype), jax.random.key_data(jax.random.key(0)), 0.4, (1,), "hash"

    @staticmethod
    def examples(key, dtype):
        x, words, rate, broadcast_dims, generator = DropoutFunction.example(key, dtype)
        return {
            "all dropped": (x, words, 1.0, (), generator),
            "nothing dropped": (x, words, 0.0, (), generator),
            "infinite": (x.at[0].set(jnp.inf), words, rate, broadcast_dims, generator),
            "empty": (x[:0], words, rate, broadcast_dims, generator),
        }


def dropout(
    x: Float[Array, "*shape"], key: Any, *, rate: float | Float[Array, ""], broadcast_dims: Sequence[int] = (), generator: str = "hash"
) -> Float[Array, "*shape"]:
    """Sets elements to zero at random and scales the others so that the mean stays.

    Args:
        x: any array.
        key: a key of `jax.random`, or an integer seed. The mask is a function of it and of the shape.
        rate: the probability of zero, in [0, 1]. May be traced; it has no gradient.
        broadcast_dims: axes along which the mask is the same.
        generator: "hash", a counter-based hash that is several times faster than JAX's default generator; or "threefry",
            the mask of `jax.random.bernoulli(key, 1 - rate, shape)`, from the generator that `key` belongs to.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: for a rate outside [0, 1], an axis that `x` does not have, an unknown generator, an array of keys.
        TypeError: where `x` is not of a floating-point or complex dtype, or `key` is no key.
    """
    return _drop("dropout", "x", x, "key", key, rate, broadcast_dims, generator)


def _drop(who: str, what: str, x: Any, key_name: str, key: Any, rate: Any, broadcast_dims: Any, generator: Any) -> jax.Array:
    """`dropout`, whose errors are those of `who`, with its names of the array and the key."""
    x = checks.array(who, what, x, "inexact")
    rate, dims, generator = _options(who, rate, broadcast_dims, generator, x.ndim)
    settled = is_known(rate, 0) or is_known(rate, 1)
    key = checks.key(who, key_name, key, optional=settled)
    if settled:
        return jnp.zeros_like(x) if rate else x
    generator = generator if generator == "hash" else str(jax.random.key_impl(key))
    return DropoutFunction.apply(x, jax.random.key_data(key), rate, dims, generator)


def _options(who: str, rate: Any, broadcast_dims: Any, generator: Any, ndim: int | None = None) -> tuple[Any, tuple[int, ...], str]:
    """What is asked of the options; without `ndim` the axes are those of an array that is not there yet."""
    rate = checks.number(who, "rate", rate, "[0, 1]", traced=True)
    given = checks.several(broadcast_dims)
    if ndim is None:
        dims = tuple(checks.integer(who, "broadcast_dims", d) for d in given)
    else:
        dims = tuple(sorted({checks.axis(who, "broadcast_dims", d, ndim) for d in given}))
    return rate, dims, checks.choice(who, "generator", generator, GENERATORS)


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout`: the same arguments and random streams; backward keeps the key only.

    Args:
        generator: as in `dropout`; the masks are Flax's own with "threefry".
    """

    generator = "hash"

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: rnglib.Rngs | rnglib.RngStream | None = None,
        generator: str = "hash",
    ):
        rate, dims, self.generator = _options("Dropout", rate, broadcast_dims, generator)
        deterministic = checks.flag("Dropout", "deterministic", deterministic, optional=True)
        if not isinstance(rng_collection, str):
            raise TypeError(f"Dropout: rng_collection is {checks.shown(rng_collection)}, but must be the name of a stream of keys")
        if rngs is not None:
            _require_streams(rngs, rnglib.Rngs, rnglib.RngStream)
        super().__init__(rate, broadcast_dims=dims, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs)

    def __call__(self, inputs: Any, *, deterministic: bool | None = None, rngs: Any = None) -> jax.Array:
        if first_from(
            checks.flag("Dropout", "deterministic", deterministic, optional=True),
            self.deterministic,
            error_msg="Dropout: give `deterministic` to the constructor or to the call, or use `nnx.view(model, deterministic=...)`",
        ):
            return inputs
        if is_known(self.rate, 0):
            return inputs
        if is_known(self.rate, 1):
            return jnp.zeros_like(checks.array("Dropout", "inputs", inputs, "any"))
        rngs = first_from(rngs, self.rngs, error_msg="Dropout: `deterministic` is False, so give `rngs` to the constructor or to the call")
        return _drop("Dropout", "inputs", inputs, "rngs", self._key(rngs), self.rate, self.broadcast_dims, self.generator)

    def _key(self, rngs: Any) -> Any:
        _require_streams(rngs, rnglib.Rngs, rnglib.RngStream, jax.Array)
        if isinstance(rngs, rnglib.Rngs):
            return rngs[self.rng_collection]()
        return rngs() if isinstance(rngs, rnglib.RngStream) else rngs


def _require_streams(rngs: Any, *kinds: type) -> None:
    if not isinstance(rngs, kinds):
        raise TypeError(f"Dropout: rngs is {checks.shown(rngs)}, but must be random streams or one of them: nnx.Rngs(seed)")


def keep_mask(words: jax.Array, rate: Any, shape: tuple[int, ...], generator: str) -> jax.Array:
    """False with probability `rate`, a function of the words of a key and the shape.

    Args:
        words: uint32 words.
        rate: a number in (0, 1), or a traced one in [0, 1].
        shape: that of the mask.
        generator: "hash", or the implementation of `jax.random` that the words are a key of.
    """
    if generator != "hash":
        return jax.random.bernoulli(jax.random.wrap_key_data(words, impl=generator), 1 - jnp.asarray(rate, float), shape)
    return spared(hash_bits(words, shape), rate)
