"""What a program is compiled for, as far as kernels care."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from layers.core import machine


@dataclass(frozen=True)
class Place:
    """What a program is compiled for, and by what.

    Attributes:
        platform: "cpu", "cuda", "rocm", "tpu", or what another plugin calls itself.
        architecture: the compute capability of an NVIDIA GPU, the `device_kind` of another device; None where it is not known.
        jax: the minor version of JAX, such as "0.11".
    """

    platform: str
    architecture: str | None
    jax: str

    @property
    def capability(self) -> tuple[int, ...]:
        """The compute capability of an NVIDIA GPU, that of an H100 where it is not known; 0 of other devices."""
        return tuple(int(n) for n in (self.architecture or "9.0").split(".")) if self.platform == "cuda" else (0, 0)

    def __str__(self) -> str:
        return f"{self.platform}{'' if self.architecture is None else f' {self.architecture}'}, JAX {self.jax}"


def here() -> Place:
    """What is being compiled for."""
    return Place(machine.platform(), machine.architecture(), ".".join(jax.__version__.split(".")[:2]))
