"""Calls on which each kernel of a layer is tried: its errors against float64 on the CPU, and its time, beside those of XLA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core.machine import compiling_for
from layers.kernels import verified
from layers.kernels.dispatch import XLA, Call
from layers.kernels.place import here
from layers.tools import measure

LESS_EXACT = 2.0
"""How many times XLA's error a kernel's may be: XLA keeps what rounding takes from the output, and sums of 16-bit products differ."""


@dataclass(frozen=True)
class Trial:
    """One call of a layer by one kernel.

    Attributes:
        layer: the layer.
        kernel: the kernel's name.
        call: what is known of the call.
        shapes: of its arrays, which are drawn and differentiated.
        function: `implementation` to the call as a function of them.
    """

    layer: str
    kernel: str
    call: Call
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    function: Callable[[str], Callable[..., Any]]

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

        def program(*arrays: Any) -> Any:
            out, pull = jax.vjp(self.function(implementation), *arrays)
            return out, *pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

        return program

    def _exact(self, arrays: tuple[jax.Array, ...]) -> list[np.ndarray]:
        """In float64, on the CPU."""
        given = [np.asarray(x, np.float64) for x in arrays]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]), compiling_for("cpu"):
            return [np.asarray(y) for y in jax.jit(self._program(XLA))(*given)]


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
