"""What `train` can train: data that is on the machine, a model, its loss and its measure of success."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import layers
from layers.tools.language_model import LOSSES, Decoder


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


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


class Classifier(nnx.Module):
    """64 pixels to 10 classes."""

    def __init__(self, modules: ModuleType, rngs: nnx.Rngs):
        self.hidden = modules.Linear(64, 256, rngs=rngs)
        self.norm = modules.LayerNorm(256, rngs=rngs)
        self.head = modules.Linear(256, 10, rngs=rngs)
        self.relu = layers.relu if modules is layers else jax.nn.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.relu(self.norm(self.hidden(x))))


def digits(modules: ModuleType) -> Task:
    """scikit-learn's handwritten digits, every fifth held out."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
    held = np.arange(len(images)) % 5 == 0
    train, test = ((jnp.asarray(images[m]), jnp.asarray(labels[m])) for m in (~held, held))

    def draw(key: jax.Array, size: int) -> Any:
        places = jax.random.randint(key, (size,), 0, len(train[0]))
        return train[0][places], train[1][places]

    def loss(model: Any, batch: Any) -> jax.Array:
        if modules is layers:
            return layers.softmax_cross_entropy(model(batch[0]), batch[1])
        return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()

    def validate(model: Any) -> dict[str, jax.Array]:
        right = model(test[0]).argmax(-1) == test[1]
        return {"accuracy": right.mean(), "loss": loss(model, test)}

    return Task(lambda rngs: Classifier(modules, rngs), draw, loss, validate, "images", 1, 600, 128, _digest(images, labels))


def text(modules: ModuleType, *, length: int = 128, files: int = 200) -> Task:
    """The source of Python's standard library, byte by byte; the last tenth is held out."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    stream = np.frombuffer(b"\n".join(p.read_bytes() for p in sources), np.uint8)
    cut = len(stream) * 9 // 10
    train, test = jnp.asarray(stream[:cut], jnp.int32), jnp.asarray(stream[cut:], jnp.int32)

    def draw(key: jax.Array, size: int) -> jax.Array:
        starts = jax.random.randint(key, (size, 1), 0, len(train) - length - 1)
        return train[starts + jnp.arange(length + 1)]

    loss = LOSSES["ours" if modules is layers else "flax"]

    def validate(model: Any) -> dict[str, jax.Array]:
        count = min(16, len(test) // (length + 1))
        value = loss(model, test[: count * (length + 1)].reshape(count, length + 1))
        return {"loss": value, "bits_per_byte": value / np.log(2)}

    return Task(lambda rngs: Decoder(modules, rngs, vocab=256, length=length), draw, loss, validate, "bytes", length, 300, 16, _digest(stream))


TASKS: dict[str, Callable[[ModuleType], Task]] = {"digits": digits, "text": text}
