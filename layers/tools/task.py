"""What `train` asks of a thing to train."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx


@dataclass(frozen=True)
class Task:
    """One thing to train.

    Attributes:
        model: makes the model from random streams.
        draw: `(key, batch size) -> batch` of training data.
        loss: `(model, batch) -> scalar`.
        validate: `model -> metrics` by name, on data that is never drawn.
        unit: what throughput counts, and `per_example` how many of it an example has.
        steps, batch_size: defaults.
        data: a digest of the data, which differs where the data does.
    """

    model: Callable[[nnx.Rngs], Any]
    draw: Callable[[jax.Array, int], Any]
    loss: Callable[[Any, Any], jax.Array]
    validate: Callable[[Any], dict[str, jax.Array]]
    unit: str
    per_example: int
    steps: int
    batch_size: int
    data: str


def digest(*arrays: np.ndarray) -> str:
    """Of data, which differs where the data does."""
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
