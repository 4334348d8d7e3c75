"""The two numbers that a reversible network carries from coupling to coupling, and how one adds to them so that it can be undone.

In floating point (y - r) differs from x by the rounding of y = x + r. In fixed point it does not: with x = q step, an integer q and a power
of two `step`, q + round(r / step) is undone exactly. A stream in fixed point also carries x in floating point, `smooth`, whose value is
never read: it is where derivatives flow, as though nothing were rounded.

Reference: MacKay et al., "Reversible Recurrent Neural Networks", 2018, which adds in fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat
from layers.core.numerics import wide
from layers.function.function import Function


class FixedPoint(NamedTuple):
    """A stream in fixed point.

    Attributes:
        bits: the integers.
        step: what 1 stands for.
        fits: whether all that was added lay within the range of the integers.
        smooth: carries the derivative.
    """

    bits: Any
    step: Any
    fits: Any
    smooth: Any


@dataclass(frozen=True)
class Streams:
    """The arithmetic of the streams.

    Attributes:
        dtype: of the streams; None for that of the input, but float32 at least.
        exact: whether they are in fixed point.
        headroom: how many times the largest magnitude at the start a stream in fixed point can hold.
    """

    dtype: Any = None
    exact: bool = False
    headroom: float = 256.0

    def enter(self, *xs: jax.Array) -> tuple[Any, ...]:
        """The streams that start with these arrays."""
        xs = tuple(x.astype(self.dtype or wide(x.dtype)) for x in xs)
        if not self.exact:
            return xs
        exponent = _exponent(xs, self.headroom)
        return tuple(_fixed_point(x, exponent) for x in xs)

    def read(self, stream: Any) -> jax.Array:
        """Its value."""
        return ReadFunction.apply(stream.smooth, stream.bits, stream.step) if self.exact else stream

    def follow(self, stream: Any, smooth: Any) -> Any:
        """The stream with its value, and with the derivative of `smooth`, which has the same value."""
        return stream._replace(smooth=smooth) if self.exact else smooth

    def add(self, stream: Any, change: jax.Array, sign: int = 1) -> Any:
        """The stream after `change` has been added, or with `sign=-1` before."""
        if not self.exact:
            return stream + sign * change.astype(stream.dtype)
        change = change.astype(stream.step.dtype)
        whole = jnp.round(lax.stop_gradient(change) / stream.step)
        fits = stream.fits & _representable(whole, stream.bits) if sign > 0 else stream.fits
        bits = stream.bits + sign * whole.astype(stream.bits.dtype)
        return FixedPoint(bits, stream.step, fits, self.read(stream) + sign * change)

    def leave(self, stream: Any, dtype: Any) -> jax.Array:
        """Its value as the output of the network: NaN where it did not fit."""
        value = self.read(stream)
        return (jnp.where(stream.fits, value, jnp.nan) if self.exact else value).astype(dtype)

    def gradient(self, stream: Any, dy: jax.Array | None) -> jax.Array:
        """The gradient of the stream from that of `leave`; None is 0."""
        value = self.read(stream)
        dy = compat.zeros(jax.typeof(value)) if dy is None else dy.astype(value.dtype)
        return jnp.where(stream.fits, dy, jnp.nan) if self.exact else dy


class ReadFunction(Function):
    """The value of a stream in fixed point, with the derivative of `smooth`."""

    @staticmethod
    def forward(ctx, smooth, bits, step):
        return bits.astype(step.dtype) * step

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None

    @staticmethod
    def surrogate(smooth, bits, step):
        return smooth

    @staticmethod
    def example(key, dtype):
        bits = jax.random.randint(key, (3, 4), -1000, 1000)
        return bits.astype(dtype) / 256, bits, jnp.asarray(2.0**-8, dtype)

    @staticmethod
    def examples(key, dtype):
        smooth, bits, step = ReadFunction.example(key, dtype)
        return {"far out": (1e4 * smooth, bits, step), "empty": (smooth[:0], bits[:0], step)}


def _fixed_point(x: jax.Array, exponent: jax.Array) -> FixedPoint:
    """`x` with the step with which the integers reach 2^exponent, or with the least that is not subnormal."""
    least = jnp.finfo(x.dtype).minexp
    step = jnp.ldexp(jnp.ones((), x.dtype), jnp.maximum(exponent - (jnp.iinfo(_integers(x.dtype)).bits - 1), least))
    whole = jnp.round(lax.stop_gradient(x) / step)
    return FixedPoint(whole.astype(_integers(x.dtype)), step, _representable(whole, 0), x)


def _exponent(xs: tuple[jax.Array, ...], headroom: float) -> jax.Array:
    """The least power of two above `headroom` times the largest magnitude in `xs`, as its exponent."""
    dtype = jnp.result_type(*xs)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(lax.stop_gradient(x).astype(dtype)), initial=0) for x in xs]))
    mantissa, exponent = jnp.frexp(jnp.where((largest > 0) & (largest < jnp.inf), largest, 1))
    return exponent + jnp.frexp(mantissa * headroom)[1]


def _integers(dtype: Any) -> Any:
    return jnp.int64 if dtype == jnp.float64 else jnp.int32


def _representable(whole: jax.Array, bits: Any) -> jax.Array:
    """Whether `whole + bits` surely is an integer of this size, in all elements; False for NaN."""
    limit = 2.0 ** (jnp.iinfo(_integers(whole.dtype)).bits - 1) * (1 - 2.0**-20)
    return jnp.all(jnp.abs(whole) + jnp.abs(jnp.asarray(bits, whole.dtype)) < limit)
