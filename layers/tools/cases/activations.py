"""Rows of the benchmark: activations and gates."""

from __future__ import annotations

from typing import Any

import jax

from layers.activations.gelu import gelu
from layers.activations.relu import relu
from layers.activations.silu import silu
from layers.activations.swiglu import swiglu
from layers.tools.cases.case import Case, normal


def _one() -> tuple[Any, ...]:
    return normal((8192, 2048))


def _two() -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(k, (8192, 2048)) for k in keys)


def _torch_relu(torch: Any, x: Any) -> Any:
    return torch.nn.functional.relu(x)


def _torch_gelu(torch: Any, x: Any) -> Any:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _torch_silu(torch: Any, x: Any) -> Any:
    return torch.nn.functional.silu(x)


def _torch_swiglu(torch: Any, gate: Any, up: Any) -> Any:
    return torch.nn.functional.silu(gate) * up


CASES = (
    Case("relu", "ReLU, 8192 x 2048", _one, jax.nn.relu, relu, peers=(("torch", _torch_relu),)),
    Case("gelu", "GELU (tanh), 8192 x 2048", _one, jax.nn.gelu, gelu, peers=(("torch", _torch_gelu),)),
    Case("silu", "SiLU, 8192 x 2048", _one, jax.nn.silu, silu, peers=(("torch", _torch_silu),)),
    Case("swiglu", "SwiGLU gate, 8192 x 2048", _two, lambda gate, up: jax.nn.silu(gate) * up, swiglu, peers=(("torch", _torch_swiglu),)),
)
