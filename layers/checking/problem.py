"""A function and its arguments as `gradcheck` sees them: a function of floating-point arrays, and these as vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import checks
from layers.core.trees import is_array, is_inexact, replaced
from layers.function.function import Function

Fn = Callable[..., Any]


class GradcheckError(RuntimeError):
    """A gradient that is not the derivative, or a rule that breaks a promise."""


class Problem:
    """`fn` as a function of its floating-point arrays alone, as lists of flat real vectors."""

    def __init__(self, fn: Any, args: tuple[Any, ...], argnums: Any):
        fn = checks.function("gradcheck", "fn", fn)
        self.fn: Fn = fn.apply if isinstance(fn, type) and issubclass(fn, Function) else fn
        self.leaves, self.tree = jax.tree.flatten(args)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(args)]
        of_argument = [i for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
        chosen = checks.indices("gradcheck", "argnums", argnums, len(args))
        self.indices = [i for i, x in enumerate(self.leaves) if has_gradient(x) and of_argument[i] in chosen]
        if not self.indices:
            raise ValueError("gradcheck: no argument is a floating-point or complex array, so there is nothing to check")
        narrow = [paths[i] for i in self.indices if jnp.finfo(self.leaves[i].dtype).bits < 64]
        if narrow:
            warnings.warn(f"gradcheck: args{', args'.join(narrow)} are not float64; they are checked as float64 copies", UserWarning, stacklevel=4)
        self.names = [f"args{paths[i]}" for i in self.indices]
        self.inputs = [widened(self.leaves[i]) for i in self.indices]

    def outputs(self, *inputs: Any) -> list[Any]:
        return [y for y in self.results(*inputs) if has_gradient(y)]

    def results(self, *inputs: Any) -> list[Any]:
        now = [widened(x) if has_gradient(x) else x for x in self.leaves]
        return jax.tree.leaves(self.fn(*self.tree.unflatten(replaced(now, self.indices, inputs))))


def has_gradient(x: Any) -> bool:
    """Whether a leaf is an array of a floating-point or complex dtype."""
    return is_array(x) and is_inexact(x)


def widened(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)


def draw(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    parts = np.random.default_rng(seed).standard_normal((2, *shape))
    return (parts[0] + 1j * parts[1] if jnp.issubdtype(dtype, jnp.complexfloating) else parts[0]).astype(dtype)


def _as_pair(x: Any) -> jax.Array:
    """A flat real vector: the entries, or real then imaginary parts."""
    x = jnp.ravel(x)
    return jnp.concatenate([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def _from_pair(v: Any, like: Any) -> jax.Array:
    n = max(np.size(like), 0)
    return (v[:n] + 1j * v[n:] if jnp.iscomplexobj(like) else v).reshape(np.shape(like)).astype(like.dtype)


def real_size(x: Any) -> int:
    return np.size(x) * (2 if jnp.iscomplexobj(x) else 1)


def as_vector(xs: Sequence[Any]) -> jax.Array:
    """Arrays as one flat real vector."""
    return jnp.concatenate([_as_pair(x) for x in xs])


def as_arrays(v: Any, likes: Sequence[Any]) -> list[jax.Array]:
    """The arrays that `as_vector` makes this vector of."""
    ends = np.cumsum([real_size(x) for x in likes])[:-1]
    return [_from_pair(part, x) for part, x in zip(jnp.split(v, ends), likes, strict=True)]
