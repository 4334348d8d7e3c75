"""A layer as the clauses of the contract see it: a function of its floating-point arrays, and what they compare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.checking.problem import has_gradient
from layers.checking.second import derivatives_of
from layers.function.function import Function

Outputs = Callable[..., list[Any]]
"""The floating-point arrays of a result, from the arrays that have no gradient and those that have."""


class Subject:
    """A layer as a function of its floating-point arrays, a loss of it, and the gradient of that.

    What stands beside the layer is computed in NumPy: outside `jax.jit` JAX compiles each operation for each shape, which takes long.
    """

    def __init__(self, fn: Any, args: tuple[Any, ...]):
        self.cls = fn if isinstance(fn, type) and issubclass(fn, Function) else None
        leaves, tree = jax.tree.flatten(args)
        self.differentiated = [jnp.asarray(x) for x in leaves if has_gradient(x)]
        self.others = [x for x in leaves if isinstance(x, jax.Array) and not has_gradient(x)]
        self.form = tree, ["differentiated" if has_gradient(x) else "other" if isinstance(x, jax.Array) else x for x in leaves]
        surrogate = getattr(self.cls, "surrogate", None)
        layer = _of_arrays(fn if self.cls is None else self.cls.apply, leaves, tree)
        self.programs = Programs(layer, surrogate and _of_arrays(surrogate, leaves, tree))
        self.outputs = functools.partial(self.programs.outputs, self.others)
        self.gradient = functools.partial(self.programs.gradient, self.others)

    def loss(self, *moved: Any) -> Any:
        return sum((jnp.sum(jnp.real(y * weights_of(y))) for y in self.outputs(*moved)), jnp.zeros(()))

    def serves(self, other: Subject) -> bool:
        """Whether the other's arguments differ from these in the values of arrays alone."""
        try:
            return bool(self.form == other.form)
        except (TypeError, ValueError):  # arrays in an object that is no pytree
            return False

    @functools.cached_property
    def expected(self) -> tuple[Any, ...]:
        """The gradient at the arguments, without any transformation."""
        return self.gradient(*self.differentiated)

    @property
    def compiled(self) -> Callable[..., tuple[Any, ...]]:
        """`gradient`, compiled; the clause "jit" compares it with `expected`."""
        return functools.partial(self.programs.compiled, self.others)

    @property
    def derivatives(self) -> Callable[..., Any]:
        """The outputs, the gradient and its derivative along a direction, in one program; for float64."""
        return functools.partial(self.programs.derivatives, self.others)

    @property
    def wide(self) -> list[np.ndarray]:
        """The arguments in float64, where that is enabled."""
        return [np.asarray(widen(x)) for x in self.differentiated]

    @functools.cached_property
    def batched(self) -> Callable[..., tuple[Any, ...]]:
        """`gradient` of each of a batch, compiled."""
        return jax.jit(jax.vmap(self.gradient))

    @functools.cached_property
    def pairs(self) -> tuple[list[Any], list[Any]]:
        """A batch of two of each argument, and the gradient of each, stacked."""
        batch = [as_array(np.stack([x, half(x)])) for x in self.differentiated]
        halves = self.compiled(*[half(x) for x in self.differentiated])
        return batch, [np.stack(pair) for pair in zip(self.compiled(*self.differentiated), halves, strict=True)]


class Programs:
    """What is compiled of a layer; it serves all arguments that differ in the values of arrays alone.

    Args:
        outputs: the layer.
        surrogate: the function whose gradient it is meant to have, where that is another.
    """

    def __init__(self, outputs: Outputs, surrogate: Outputs | None):
        self.outputs, self.surrogate = outputs, surrogate
        self.derivatives = derivatives_of(outputs, weights_of)
        self.derivatives_of_surrogate = None if surrogate is None else derivatives_of(surrogate, weights_of)
        self.compiled = jax.jit(self.gradient)

    def gradient(self, others: list[Any], *moved: Any) -> tuple[Any, ...]:
        """That of a loss whose gradient in each output is its weights."""
        outputs, pull = jax.vjp(functools.partial(self.outputs, others), *moved)
        return pull([jnp.asarray(weights_of(y)) for y in outputs])


def _of_arrays(fn: Callable[..., Any], leaves: Sequence[Any], tree: Any) -> Outputs:
    """`fn` as a function of the arrays among the leaves of its arguments."""

    def outputs(others: list[Any], *moved: Any) -> list[Any]:
        other, inexact = iter(others), iter(moved)
        now = [next(inexact) if has_gradient(x) else next(other) if isinstance(x, jax.Array) else x for x in leaves]
        return [y for y in jax.tree.leaves(fn(*tree.unflatten(now))) if has_gradient(y)]

    return outputs


def weights_of(y: Any) -> Any:
    """The gradient of an output: numbers without symmetry, of its shape and dtype."""
    return np.cos(np.arange(np.size(y), dtype=np.float32)).reshape(np.shape(y)).astype(y.dtype)


def as_array(x: Any, dtype: Any = None) -> jax.Array:
    return jnp.asarray(np.asarray(x).astype(dtype or x.dtype))


def half(x: Any) -> jax.Array:
    return as_array(np.asarray(x) / 2, x.dtype)


def widen(x: Any) -> jax.Array:
    return as_array(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def same(actual: Sequence[Any], expected: Sequence[Any], *, tolerance: float = 2e-4) -> None:
    """Raises AssertionError where arrays differ by more than `tolerance` times the largest number that is expected, or 1."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = np.asarray(a), np.asarray(e)
        scale = max(1.0, float(np.max(np.abs(e), initial=0)))
        assert a.shape == e.shape, f"array {i} has shape {a.shape}, not {e.shape}"
        worst = float(np.max(np.abs(a - e), initial=0))
        assert worst <= tolerance * scale, f"array {i} differs by {worst:.3g}"
