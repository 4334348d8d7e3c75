"""Compares a function with itself rewritten, and says what was replaced."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import layers
from tests.support import assert_trees_close


def replaced(fn: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """The names of what took the place of a part of `fn`, in order."""
    return sorted(r.name for r in layers.rewrite(fn, **options).report(*args).replaced)


def reasons(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Why parts that nearly fitted were left."""
    return [r.reason for r in layers.rewrite(fn).report(*args).left]


def total(fn: Callable[..., Any]) -> Callable[..., Any]:
    """All that `fn` returns in one number, each element with a weight of its own."""

    def of(*args: Any) -> Any:
        leaves = jax.tree.leaves(fn(*args))
        return sum((x.astype(wide(x)) * jnp.cos(jnp.arange(x.size, dtype=wide(x))).reshape(x.shape)).sum() for x in leaves)

    return of


def wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def all_of(fn: Callable[..., Any], args: Any) -> Any:
    """The value of `fn`, its gradient, its directional derivative and its values over a batch, compiled as one."""
    at = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

    def moved(*some: Any) -> Any:
        full = list(args)
        for i, x in zip(at, some, strict=True):
            full[i] = x
        return total(fn)(*full)

    def run(*args: Any) -> Any:
        floats = [args[i] for i in at]
        gradient = jax.grad(moved, tuple(range(len(at))))(*floats)
        slope = jax.jvp(moved, floats, [jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in floats])[1]
        return fn(*args), gradient, slope, jax.vmap(fn)(*(jnp.stack([a, a[::-1]]) for a in args))

    return jax.jit(run)(*args)


def assert_same(fn: Callable[..., Any], args: Any, *, rtol: float | None = None) -> None:
    """Values, dtypes, gradients, derivatives forward, and values over a batch of `fn` rewritten are those of `fn`."""
    plain, new = all_of(fn, args), all_of(layers.rewrite(fn), args)
    narrow = any(getattr(a, "dtype", np.dtype("f4")).itemsize == 2 for a in args)
    tolerance = rtol or (3e-2 if narrow else 2e-5)
    for a, e in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(np.abs(e).max(initial=0), 1e-3))


def assert_same_value(fn: Callable[..., Any], args: Any) -> None:
    """The values of a function that stays as it is."""
    plain, new = jax.jit(lambda *a: (fn(*a), layers.rewrite(fn)(*a)))(*args)
    assert_trees_close(new, plain, rtol=1e-6, atol=1e-6)


__all__ = ["all_of", "assert_same", "assert_same_value", "assert_trees_close", "reasons", "replaced", "total"]
