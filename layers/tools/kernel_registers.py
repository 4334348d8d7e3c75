"""`python -m layers.tools.kernel_registers [FILE]`: what NVIDIA's assembler says of the own kernels, compiled for an H100 that is not here.

Prints, and writes to FILE, the registers of a thread and the bytes that it spills to memory for want of them, for each kernel of each call.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from layers.kernels import mosaic_cross_entropy, mosaic_selective_scan
from layers.tools.devices import compile_for

RESULTS = Path(__file__).with_name("kernel_registers.json")


def _of(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _cross_entropy(dtype: str, vocab: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    logits, row = _of((64, vocab), dtype), _of((64,))
    name = f"softmax_cross_entropy, {dtype}, {vocab} classes"
    return {
        f"{name}, forward": (mosaic_cross_entropy.forward, (logits,)),
        f"{name}, backward": (mosaic_cross_entropy.backward, (logits, row, row, row, _of((64,), "int32"))),
    }


def _selective_scan(dtype: str, n: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    u, rate, a, b, skip, state = _of((2, 64, 256), dtype), _of((2, 64, 256)), _of((n, 256)), _of((2, 64, n)), _of((256,)), _of((2, n, 256))
    starts = _of((2, 64 // mosaic_selective_scan.CHUNK, n, 256))
    name = f"selective_scan, {dtype}, {n} states"
    return {
        f"{name}, forward": (mosaic_selective_scan.forward, (u, rate, a, b, b, skip, state)),
        f"{name}, backward": (mosaic_selective_scan.backward, (u, rate, a, b, b, skip, starts, u, state)),
    }


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The kernels that are compiled, by what they are called: a function, and the shapes of its arguments."""
    losses = _cross_entropy("bfloat16", 128256) | _cross_entropy("bfloat16", 4099) | _cross_entropy("float32", 128256)
    return losses | _selective_scan("bfloat16", 16) | _selective_scan("float32", 4)


def measure() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each. Nothing may have been compiled for a GPU before: the compiler reads once where it is to write."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        for name, (kernel, shapes) in calls().items():
            compile_for("h100", kernel, shapes)
            (written,) = Path(folder).glob("*.ptxas")
            text = written.read_text()
            found[name] = {"registers": _number(r"Used (\d+) registers", text), "spilled": _number(r"(\d+) bytes spill stores", text)}
            for file in Path(folder).iterdir():
                file.unlink()
    return found


def _number(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)))


def main(path: str | None = None) -> None:
    jax.config.update("jax_platforms", "cpu")
    found = measure()
    for name, figures in found.items():
        print(f"{name}: {figures['registers']} registers, {figures['spilled']} bytes spilled")
    if path is not None:
        Path(path).write_text(json.dumps(found | {"jax": jax.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
