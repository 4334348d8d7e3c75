"""Whether a layer is right on this machine: its example in float32 and in bfloat16, beside float64 on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core.machine import compiling_for
from layers.core.trees import is_array, replaced
from layers.function.function import Function

MOST = {"float32": 1e-4, "bfloat16": 0.1}
"""The relative error of an output or gradient up to which a layer is right: a few times what the examples' sums lose at most."""


def name_of(layer: type[Function]) -> str:
    """As its file is called."""
    return layer.__module__.rpartition(".")[2]


def verdict(layer: type[Function]) -> tuple[str, bool]:
    """The errors in words, and whether those in float32 are small enough.

    In bfloat16 a layer that rounds, or chooses, may round or choose otherwise than in float64: a large error is said, and is no failure.
    """
    words, well = [], True
    for dtype, most in MOST.items():
        try:
            found = error_of(layer, jnp.dtype(dtype))
        except Exception as error:
            words.append(f"{dtype} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            well &= dtype != "float32"
            continue
        words.append(f"{dtype} {found:.1e}" + ("" if found <= most else f", more than {most:g}"))
        well &= found <= most or dtype != "float32"
    return ", ".join(words), well


def error_of(layer: type[Function], dtype: Any) -> float:
    """The largest relative error of an output or gradient of the layer's example."""
    made: Any = layer
    leaves, tree = jax.tree.flatten(made.example(jax.random.key(0), dtype))
    with jax.default_matmul_precision("highest"):
        found = _outputs_and_gradients(layer, leaves, tree)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]), compiling_for("cpu"):
        exact = _outputs_and_gradients(layer, [_in_float64(x) for x in leaves], tree)
    return max((_relative(x, e) for x, e in zip(found, exact, strict=True)), default=0.0)


def _in_float64(x: Any) -> Any:
    return jnp.asarray(np.asarray(x, np.float64)) if _moves(x) else x


def _moves(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def _outputs_and_gradients(layer: type[Function], leaves: list[Any], tree: Any) -> list[np.ndarray]:
    differentiated = [i for i, x in enumerate(leaves) if _moves(x)]

    def outputs(*moved: Any) -> list[Any]:
        return [y for y in jax.tree.leaves(layer.apply(*tree.unflatten(replaced(leaves, differentiated, moved)))) if _moves(y)]

    def program(*moved: Any) -> list[Any]:
        outs, pull = jax.vjp(outputs, *moved)
        return [*outs, *pull([jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype) for y in outs])]

    return [np.asarray(y, np.float64) for y in jax.jit(program)(*[leaves[i] for i in differentiated])]


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    """Of the norms; equal infinities are no error."""
    if found.shape != exact.shape:
        return float("inf")
    differs = np.where((found == exact) | (np.isnan(found) & np.isnan(exact)), 0, found - exact)
    return float(np.linalg.norm(differs) / max(np.linalg.norm(np.where(np.isfinite(exact), exact, 0)), 1.0))
