"""Calls on which each kernel of a layer is tried: its errors against float64 on the CPU, and its time, beside those of XLA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import layers
from layers.core.machine import compiling_for
from layers.kernels import verified
from layers.kernels.attention import KERNELS, AttentionCall
from layers.kernels.dispatch import XLA, recording
from layers.kernels.place import here
from layers.tools import measure

LAYER = "dot_product_attention"
SIZES = {"batch": 2, "time": 2048, "heads": 8, "kv_heads": 4}
LESS_EXACT = 2.0
"""How many times XLA's error a kernel's may be: XLA keeps what rounding takes from the output, and sums of 16-bit products differ."""


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


@dataclass(frozen=True)
class Trial:
    """One call of a layer by one kernel.

    Attributes:
        layer: the layer.
        kernel: the kernel's name.
        call: what is known of the call.
        shapes: of its arrays that are drawn and differentiated: query, key and value first.
        options: the other options.
        names: of those after the first three.
    """

    layer: str
    kernel: str
    call: AttentionCall
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...]
    options: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.layer} by {self.kernel}, {self.call.dtype}, {self.call.shape_class}"

    def row(self) -> dict[str, Any]:
        """The row of the table: `against` is "" where the kernel is to be taken."""
        key = verified.key_of(self.layer, self.kernel, self.call.dtype, self.call.shape_class, here())
        row: dict[str, Any] = dict(zip(verified.KEY, key, strict=True))
        figures = dict.fromkeys(("milliseconds", "xla_milliseconds", "error", "xla_error"))
        try:
            figures |= self._figures()
            against = _against(figures)
        except Exception as error:  # a kernel that fails is shut out, whatever it fails by
            against = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row | figures | {"against": against, "source": f"python -m layers verify, {jax.devices()[0].device_kind}, JAX {jax.__version__}"}

    def _figures(self) -> dict[str, float]:
        random = np.random.default_rng(0)
        arrays = tuple(jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype) for x in self.shapes)
        exact = self._exact(arrays)
        compiled = {name: measure.compile_program(self._program(name), arrays) for name in (self.kernel, XLA)}
        errors = {name: _error(run(*arrays), exact) for name, run in compiled.items()}
        times = measure.in_turn({name: lambda run=run: run(*arrays) for name, run in compiled.items()}, 5)
        seconds = {name: float(np.median(found)) for name, found in times.items()}
        of = lambda name, kind, factor, found: {f"{'xla_' if name == XLA else ''}{kind}": factor * found[name]}
        return {k: v for name in compiled for k, v in (of(name, "milliseconds", 1e3, seconds) | of(name, "error", 1, errors)).items()}

    def _program(self, implementation: str) -> Callable[..., Any]:
        """Output and gradients of all arrays."""

        def attend(*arrays: Any) -> Any:
            beside = dict(zip(self.names, arrays[3:], strict=True))
            return layers.dot_product_attention(*arrays[:3], **beside, **self.options, implementation=implementation)

        def program(*arrays: Any) -> Any:
            out, pull = jax.vjp(attend, *arrays)
            return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

        return program

    def _exact(self, arrays: tuple[jax.Array, ...]) -> list[np.ndarray]:
        """In float64, on the CPU."""
        given = [np.asarray(x, np.float64) for x in arrays]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]), compiling_for("cpu"):
            return [np.asarray(y) for y in jax.jit(self._program(XLA))(*given)]


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
    with recording() as recorder:
        jax.eval_shape(lambda *a: layers.dot_product_attention(*a[:3], **dict(zip(drawn, a[3:], strict=True)), **rest, implementation=XLA), *shapes)
    call: Any = recorder.decisions[0].call
    return Trial(LAYER, kernel, call, shapes, tuple(drawn), rest)


def _error(found: Any, exact: Any) -> float:
    """The largest relative error of an output or gradient; of one that is not finite, infinite."""
    errors = []
    for x, e in zip(found, exact, strict=True):
        wide = np.asarray(x, np.float64)
        errors.append(np.linalg.norm(wide - e) / max(np.linalg.norm(e), np.finfo(np.float32).tiny) if np.isfinite(wide).all() else np.inf)
    return float(max(errors))


def _against(figures: dict[str, Any]) -> str:
    """Why the kernel is not to be taken."""
    error, of_xla = figures["error"], figures["xla_error"]
    if not error <= LESS_EXACT * of_xla:
        return f"less exact than XLA: an error of {error:.2e} against {of_xla:.2e}"
    if not figures["milliseconds"] < figures["xla_milliseconds"]:
        return f"slower than XLA: {figures['milliseconds']:.3g} ms against {figures['xla_milliseconds']:.3g}"
    return ""
