"""Calls of attention on which its kernels are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import layers
from layers.kernels.attention import KERNELS
from layers.kernels.dispatch import XLA, recording
from layers.kernels.place import here
from layers.tools.verify_kernels import Trial

LAYER = "dot_product_attention"
SIZES = {"batch": 2, "time": 2048, "heads": 8, "kv_heads": 4}


def _options(sizes: dict[str, int], head_dim: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """The options of the calls that are tried, by what they are called; what has a shape and a dtype only is drawn, and differentiated."""
    batch, time, heads = sizes["batch"], sizes["time"], sizes["heads"]
    lengths = {"query_seq_lengths": np.full(batch, time - time // 4), "key_value_seq_lengths": np.full(batch, time - time // 3)}
    ids = np.broadcast_to(np.arange(time) // max(time // 4, 1), (batch, time))
    return {
        "causal": {"is_causal": True},
        "plain": {},
        "causal window": {"is_causal": True, "local_window_size": (time // 8, 0)},
        "lengths": lengths,
        "causal, lengths": {"is_causal": True} | lengths,
        "causal, segments": {"is_causal": True, "segment_ids": ids},
        "causal, sinks": {"is_causal": True, "sinks": jax.ShapeDtypeStruct((heads,), jnp.float32)},
        "bias": {"bias": jax.ShapeDtypeStruct((1, heads, time, time), dtype)},
        "bias of batch": {"bias": jax.ShapeDtypeStruct((batch, heads, time, time), dtype)},
    }


def trials(sizes: dict[str, int] | None = None) -> Iterator[Trial]:
    """One for each kernel, dtype and class of calls that the kernel does not refuse here."""
    sizes, place = sizes or SIZES, here()
    for name, kernel in KERNELS.items():
        for dtype in (jnp.bfloat16, jnp.float16):
            for head_dim in (128, 64):
                for options in _options(sizes, head_dim, dtype).values():
                    trial = _trial(name, sizes, head_dim, dtype, options)
                    if kernel.refuse(trial.call, place) is None:
                        yield trial


def _trial(kernel: str, sizes: dict[str, int], head_dim: int, dtype: Any, options: dict[str, Any]) -> Trial:
    heads = (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])
    drawn = {n: x for n, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    rest = {n: x for n, x in options.items() if n not in drawn}
    shapes = (*(jax.ShapeDtypeStruct((sizes["batch"], sizes["time"], n, head_dim), dtype) for n in heads), *drawn.values())

    def attend(implementation: str) -> Callable[..., Any]:
        return lambda *a: layers.dot_product_attention(*a[:3], **dict(zip(drawn, a[3:], strict=True)), **rest, implementation=implementation)

    with recording() as recorder:
        jax.eval_shape(attend(XLA), *shapes)
    return Trial(LAYER, kernel, recorder.decisions[0].call, shapes, attend)
