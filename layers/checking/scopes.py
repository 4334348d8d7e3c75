"""Gives every call of an nnx module a named scope of its path, which Linen does by itself and nnx does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx


def modules_in(values: Any) -> list[Any]:
    """The outermost nnx modules in a pytree."""
    return [x for x in jax.tree.leaves(values, is_leaf=lambda x: isinstance(x, nnx.Module)) if isinstance(x, nnx.Module)]


@contextlib.contextmanager
def module_scopes(example: Any) -> Iterator[Any]:
    """Patches `__call__` of every module class that occurs in `example` while the block runs.

    Yields:
        A function to be called with the modules as traced, which are other objects than those of `example`: it notes their paths.
    """
    classes = {type(m) for root in modules_in(example) for _, m in nnx.iter_modules(root) if "__call__" in vars(type(m))}
    originals = {c: vars(c)["__call__"] for c in classes}
    paths: dict[int, str] = {}
    keep: list[Any] = []
    stack: list[str] = []

    def note(values: Any) -> None:
        for root in modules_in(values):
            for path, module in nnx.iter_modules(root):
                keep.append(module)
                paths[id(module)] = ".".join(map(str, path)) or type(root).__name__

    def patched(original: Any) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self)) or type(self).__name__
            parent = f"{stack[-1]}." if stack else ""
            stack.append(path)
            try:
                with jax.named_scope(path.removeprefix(parent)):
                    return original(self, *args, **kwargs)
            finally:
                stack.pop()

        return __call__

    try:
        for c, original in originals.items():
            c.__call__ = patched(original)
        yield note
    finally:
        for c, original in originals.items():
            c.__call__ = original
