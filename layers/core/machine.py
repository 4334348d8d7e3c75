"""What the machine wants: small blocks for the caches of a CPU, few large ones for an accelerator, which starts a kernel for each step of a loop.

A program is traced for what it will be compiled for. That is taken to be JAX's default device, unless `compiling_for` says otherwise; on another one
the program is as right, only with blocks of the wrong size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax

from layers.core import checks

T = TypeVar("T")

UNLIMITED = 1 << 62
"""Bytes of a block that takes all there is."""

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_asked: Any = jax.make_user_context(None)  # part of the key of JAX's caches: what was traced for another platform is traced anew


def compiling_for(platform: str, architecture: str | None = None) -> contextlib.AbstractContextManager[None]:
    """A block in which layers are traced for this platform, whatever JAX's default device is.

    For `jax.export`, or to compile for a device that is not there:

        with layers.compiling_for("cuda"):
            exported = jax.export.export(jax.jit(step), platforms=["cuda"])(*args)

    Args:
        platform: "cpu", "cuda", "rocm" or "tpu".
        architecture: which of its kind, as JAX's devices say it: the compute capability of an NVIDIA GPU ("9.0" for an H100), the `device_kind` of a
            TPU ("TPU v5"). None for any: then only kernels that are asked for are taken, since each was verified on some.

    Raises:
        ValueError: for another platform.
        TypeError: where `architecture` is no text.
    """
    asked = checks.choice("compiling_for", "platform", platform, PLATFORMS)
    if not isinstance(architecture, (str, type(None))):
        raise TypeError(f"compiling_for: architecture is {checks.shown(architecture)}, but must be a text, such as '9.0' for an H100, or None")
    return _asking((asked, architecture))


@contextlib.contextmanager
def _asking(asked: tuple[str, str | None]) -> Iterator[None]:
    with _asked(asked):
        yield


def is_asked_for() -> bool:
    """Whether what is compiled for was said by `compiling_for`: it may not be on this machine."""
    return _asked.value is not None


def architecture() -> str | None:
    """Which kind of that platform is compiled for: a compute capability, or the `device_kind`; None where it is not known."""
    if _asked.value is not None:
        return _asked.value[1]
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return getattr(device, "compute_capability", None) or device.device_kind


def platform() -> str:
    """What is compiled for: one of `PLATFORMS`, or what another plugin calls itself."""
    if _asked.value is not None:
        return _asked.value[0]
    config: Any = jax.config
    device = config.jax_default_device
    found = jax.default_backend() if device is None else getattr(device, "platform", device)
    if found != "gpu":
        return found
    return "rocm" if "rocm" in jax.devices("gpu")[0].client.platform_version.lower() else "cuda"


def on_accelerator() -> bool:
    """Whether what is compiled for is something else than a CPU."""
    return platform() != "cpu"


def choose(on_cpu: T, otherwise: T) -> T:
    """The first on a CPU, the second on an accelerator."""
    return otherwise if on_accelerator() else on_cpu
