"""Measurements and comparisons that several tests share."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def assert_trees_close(actual: Any, expected: Any, *, rtol: float, atol: float = 0.0) -> None:
    """Same structure, and every array close."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=rtol, atol=atol)


def draw_normal(seed: int, shape: tuple[int, ...] = (), dtype: Any = None) -> jax.Array:
    """Normal numbers, drawn by NumPy: `jax.random` compiles for each shape. Complex ones have two such parts, over √2."""
    parts = np.random.default_rng(seed).standard_normal((2, *shape))
    dtype = jnp.dtype(dtype or jnp.result_type(float))
    return jnp.asarray(((parts[0] + 1j * parts[1]) / 2**0.5 if jnp.issubdtype(dtype, jnp.complexfloating) else parts[0]).astype(dtype))


def jit_grad(fn: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """`jax.grad`, compiled as one program; outside `jax.jit` JAX compiles each operation for each shape, which takes long."""
    return jax.jit(jax.grad(fn, *args, **options))


def jit_value_and_grad(fn: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """`jax.value_and_grad`, compiled as one program."""
    return jax.jit(jax.value_and_grad(fn, *args, **options))


def temp_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """The temporary memory in bytes of the compiled `fn`: exact, and the same in every run."""
    return planned_bytes(jax.jit(fn).lower(*args).compile())


def planned_bytes(compiled: Any) -> int:
    """The temporary memory in bytes of a compiled program; the test that asks is skipped where the plan is not that of a CPU."""
    if jax.default_backend() != "cpu":
        pytest.skip("needs the memory that XLA plans on a CPU")
    return compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def mesh_of(size: int, name: str, kind: Any) -> jax.sharding.Mesh:
    """A mesh of so many devices along one axis; the test that asks is skipped where there are fewer."""
    if jax.device_count() < size:
        pytest.skip(f"needs {size} devices")
    return jax.make_mesh((size,), (name,), axis_types=(kind,))


def saved_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """The bytes that stay alive from the forward to the backward pass of `fn` beyond its arguments."""
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *args))
    total = sum(x.size * x.dtype.itemsize for x in kept)
    return total - sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args))


@functools.cache
def _torch_references() -> dict[str, dict[str, Any]]:
    return json.loads((pathlib.Path(__file__).parent / "data" / "torch.json").read_text())


def torch_reference(name: str) -> dict[str, Any]:
    """A case of `torch_references.py`: arguments, results and gradients by name, lists of numbers as NumPy arrays in float64 and int64."""
    return {k: np.array(v) if isinstance(v, list) else v for k, v in _torch_references()[name].items()}
