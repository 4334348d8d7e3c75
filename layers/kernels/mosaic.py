"""Pallas kernels for NVIDIA's Hopper by Mosaic: how they are called, and interpreted where there is no such GPU.

A value of a kernel lies in the registers of a warpgroup of `LANES` threads, by a layout. In interpret mode, where values are arrays, layouts are left
out: they say where a value is, not what it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import compat
from layers.kernels.place import Place

LANES = 128
"""Threads of a warpgroup."""

_interpreter: Any = jax.make_user_context(None)  # part of the key of JAX's caches: what was traced for a GPU is traced anew


@contextlib.contextmanager
def interpreting(**options: Any) -> Iterator[None]:
    """A block in which kernels run on the CPU, by JAX's interpreter; `options` are those of its parameters, such as `detect_races`."""
    with _interpreter(compat.mosaic_interpreter(**options)):
        yield


def interprets() -> bool:
    """Whether kernels are interpreted."""
    return _interpreter.value is not None


def refuse_place(place: Place, dtype: str, varies: bool, mesh: str) -> str | None:
    """Why no kernel of this kind can run there, on arrays of this dtype that lie so; None where one can."""
    reasons = {
        f"it runs on NVIDIA GPUs, but this is compiled for {place.platform}": place.platform != "cuda" and not interprets(),
        f"it takes compute capability 9.0, but this is compiled for {place.architecture}": place.platform == "cuda" and place.capability[0] != 9,
        f"it takes bfloat16, float16 and float32, but this is {dtype}": dtype not in ("bfloat16", "float16", "float32"),
        "its arrays may lie on several devices: use shard_map": bool(mesh),
        "it does not say along which axes of a mesh its results vary: use shard_map(check_vma=False)": varies,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run(body: Callable[..., None], arrays: tuple[jax.Array, ...], *, rough: bool = False, **options: Any) -> Any:
    """Runs a kernel.

    Args:
        body: of references to its arguments and results in the GPU's memory, and to its scratch.
        arrays: the arguments.
        rough: whether exp and the like may be wrong in the last digits of float32.
        **options: of `plgpu.kernel`: `grid`, `grid_names`, `out_type`, `scratch_types`.
    """
    plgpu = _plgpu()
    params = plgpu.CompilerParams(
        approx_math=rough, lowering_semantics=plgpu.LoweringSemantics.Lane
    )  # "Warpgroup" takes ten times as long to compile
    return plgpu.kernel(body, interpret=_interpreter.value, compiler_params=params, **options)(*arrays)


def strided(length: int, vector: int = 1) -> Any:
    """The layout in which thread i holds the i-th `vector` elements of every `LANES` times as many."""
    return _plgpu().Layout.WG_STRIDED((length,), vec_size=vector)


def load(ref: Any, layout: Any) -> jax.Array:
    """What a reference holds, in this layout."""
    return ref[...] if interprets() else compat.mosaic_load(ref, layout)


def laid(x: jax.Array, layout: Any) -> jax.Array:
    """A value in this layout."""
    return x if interprets() else _plgpu().layout_cast(x, layout)


def iota(length: int, layout: Any) -> jax.Array:
    return laid(lax.broadcasted_iota(jnp.int32, (length,), 0), layout)


def full(length: int, value: float, layout: Any) -> jax.Array:
    """One float32 number in this layout."""
    return laid(jnp.full((length,), value, jnp.float32), layout)


def shared(shape: tuple[int, ...] = (), dtype: Any = jnp.float32, *, arrivals: int = 0) -> Any:
    """Shared memory of a block of threads, or a barrier that so many copies arrive at."""
    return _plgpu().Barrier(num_arrivals=arrivals) if arrivals else _plgpu().SMEM(shape, dtype)


def summed_rows(ref: Any) -> jax.Array:
    """The sum of each row of 64 in shared memory."""
    return load(ref, _plgpu().Layout.WGMMA).sum(axis=1)


@functools.cache
def pallas() -> Any:
    """`jax.experimental.pallas`, imported when it is used."""
    from jax.experimental import pallas

    return pallas


@functools.cache
def _plgpu() -> Any:
    from jax.experimental.pallas import mosaic_gpu  # takes a second: not with `import layers`

    return mosaic_gpu
