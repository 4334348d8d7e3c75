"""Activations: each function beside its derivative, written by hand.

Both work in float32 or wider (`elementwise` sees to that) and have their limits at ±inf: a factor that is infinite there is bounded first, to
where the other factor is already 0. Values at finite arguments are those of `jax.nn` bit for bit. `pull` is the derivative times the gradient
that arrives, which multiplies before the terms are added where that rounds less.

    relu          max(x, 0)                 1 where x > 0, else 0
    relu_squared  max(x, 0)²                2 max(x, 0)
    silu          x σ(x)                    σ(x) + x σ(x) σ(-x)
    softplus      log(1 + eˣ)               σ(x)
    mish          x t, t = tanh(softplus)   t + x t';  with w = eˣ, n = w (w + 2): t = n / (n + 2), t' = 4 w (w + 1) / (n + 2)²
    gelu          x (1 + t) / 2             (1 + t) / 2 + x (1 - t²) u' / 2;  t = tanh u, u = √(2/π) (x + 0.044715 x³)
    gelu_exact    x Φ(x)                    Φ(x) + x φ(x);  Φ and φ the distribution and density of the normal law
    tanh          t                         1 - t²
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import checks
from layers.core.numerics import wide


class Activation(NamedTuple):
    """A function of one array, element by element, and its gradient: `(x, dy)` to dy times the derivative at x."""

    value: Callable[[jax.Array], jax.Array]
    pull: Callable[[jax.Array, jax.Array], jax.Array]


def differentiable(f: Activation) -> Callable[[jax.Array], jax.Array]:
    """`f.value` with the derivative `f.pull`, for rules that JAX differentiates: it has its limits at ±inf too."""
    value = jax.custom_jvp(f.value)
    value.defjvp(lambda primals, tangents: (value(*primals), f.pull(*primals, *tangents)))
    return value


def elementwise(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`fn(*arrays)` computed in float32 or wider, rounded once to the common dtype of the arrays."""
    dtype = jnp.result_type(*arrays)
    return jax.tree.map(lambda y: y.astype(dtype), fn(*[x.astype(wide(dtype)) for x in arrays]))


def _above(x: jax.Array) -> jax.Array:
    """x, and the least finite number for -inf."""
    return lax.max(x, jnp.asarray(jnp.finfo(x.dtype).min, x.dtype))


def _finite(x: jax.Array) -> jax.Array:
    """x, and the greatest finite number of its sign for ±inf."""
    return lax.min(_above(x), jnp.asarray(jnp.finfo(x.dtype).max, x.dtype))


def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _relu_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.where(x > 0, dy, 0)


def _relu_squared(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.maximum(x, 0))


def _relu_squared_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    return dy * (2 * jnp.maximum(x, 0))


def _silu(x: jax.Array) -> jax.Array:
    return _above(x) * lax.logistic(x)


def _silu_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    s = lax.logistic(x)
    return dy * (s + _finite(x) * (s * lax.logistic(-x)))


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.logaddexp(x, 0)


def _mish(x: jax.Array) -> jax.Array:
    return _above(x) * jnp.tanh(jnp.logaddexp(x, 0))


def _mish_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    x = jnp.clip(x, -800, 25)  # e⁻⁸⁰⁰ is 0 in float64, and the slope at 25 is 1
    w = jnp.exp(x)
    n = w * (w + 2)
    return dy * ((n + x * (4 * w * ((w + 1) / (n + 2)))) / (n + 2))


ROOT = math.sqrt(2 / math.pi)


def _gelu(x: jax.Array) -> jax.Array:
    return _above(x) * (0.5 * (1 + jnp.tanh(ROOT * (x + 0.044715 * x**3))))


def _gelu_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    x = jnp.clip(x, -10, 10)  # where t is ±1 in float64
    t = jnp.tanh(ROOT * (x + 0.044715 * x**3))
    return dy * (0.5 * (1 + t)) + (dy * (0.5 * x)) * ((1 - t * t) * (ROOT * (1 + 3 * 0.044715 * x * x)))


def _gelu_exact(x: jax.Array) -> jax.Array:
    return 0.5 * _above(x) * lax.erfc(-x * math.sqrt(0.5))


def _gelu_exact_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    x = jnp.clip(x, -40, 40)  # where φ is 0 in float64
    z = x * math.sqrt(0.5)
    return dy * (0.5 * lax.erfc(-z)) + (dy * x) * (jnp.exp(-z * z) * (1 / math.sqrt(2 * math.pi)))


def _tanh_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    t = jnp.tanh(x)
    return dy * (1 - t * t)


def _softplus_pull(x: jax.Array, dy: jax.Array) -> jax.Array:
    return dy * lax.logistic(x)


RELU = Activation(_relu, _relu_pull)
RELU_SQUARED = Activation(_relu_squared, _relu_squared_pull)
SILU = Activation(_silu, _silu_pull)
SOFTPLUS = Activation(_softplus, _softplus_pull)
MISH = Activation(_mish, _mish_pull)
GELU = Activation(_gelu, _gelu_pull)
GELU_EXACT = Activation(_gelu_exact, _gelu_exact_pull)
TANH = Activation(jnp.tanh, _tanh_pull)

ACTIVATIONS = {
    "gelu": GELU,
    "gelu_exact": GELU_EXACT,
    "relu": RELU,
    "silu": SILU,
    "relu_squared": RELU_SQUARED,
    "mish": MISH,
    "softplus": SOFTPLUS,
    "tanh": TANH,
}


def read_activation(who: str, value: Any) -> Activation:
    """One by its name, or any function of each element, whose derivative is then JAX's."""
    if isinstance(value, str) or not callable(value):
        return ACTIVATIONS[checks.choice(who, "activation", value, ACTIVATIONS)]
    made = jax.eval_shape(value, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    if getattr(made, "shape", None) != (2, 3):
        raise ValueError(f"{who}: activation is a function that makes {made} of a (2, 3) array, but must keep the shape")
    f: Any = value
    return Activation(f, lambda a, dh: jax.vjp(f, a)[1](dh)[0])
