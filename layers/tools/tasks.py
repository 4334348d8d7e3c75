"""What `train` can train: data that is on the machine, a model, its loss and its measure of success."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import layers
from layers.tools.expert_block import PlainGatedMoE, RoutedExperts, routing_losses
from layers.tools.language_model import LOSSES, Decoder
from layers.tools.policy_task import backwards
from layers.tools.task import Task, digest


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
        indices = jax.random.randint(key, (size,), 0, len(train[0]))
        return train[0][indices], train[1][indices]

    def loss(model: Any, batch: Any) -> jax.Array:
        if modules is layers:
            return layers.softmax_cross_entropy(model(batch[0]), batch[1])
        return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()

    def validate(model: Any) -> dict[str, jax.Array]:
        right = model(test[0]).argmax(-1) == test[1]
        return {"accuracy": right.mean(), "loss": loss(model, test)}

    return Task(lambda rngs: Classifier(modules, rngs), draw, loss, validate, "images", 1, 600, 128, digest(images, labels))


def text(modules: ModuleType) -> Task:
    """The source of Python's standard library, byte by byte; the last tenth is held out."""
    return _text(lambda rngs: Decoder(modules, rngs, vocab=256, length=LENGTH), modules)


def text_fp8(modules: ModuleType) -> Task:
    """The same with every product of the linear layers in 8 bits; Flax's are of float32."""

    def model(rngs: nnx.Rngs) -> Decoder:
        made = Decoder(nnx, rngs, vocab=256, length=LENGTH)
        if modules is layers:
            layers.swap(made, fp8=True)
        return made

    return _text(model, modules)


def text_moe(modules: ModuleType) -> Task:
    """The same with 8 experts in each block in place of the perceptron, 2 of them for each byte."""
    kind = layers.GatedMoE if modules is layers else PlainGatedMoE
    experts = lambda width, rngs: RoutedExperts(kind(width, 2 * width, 8, 2, rngs=rngs))
    return _text(lambda rngs: Decoder(modules, rngs, vocab=256, length=LENGTH, experts=experts), modules)


LENGTH = 128


def _text(model: Callable[[nnx.Rngs], Any], modules: ModuleType, *, files: int = 200) -> Task:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    stream = np.frombuffer(b"\n".join(p.read_bytes() for p in sources), np.uint8)
    cut = len(stream) * 9 // 10
    train, test = jnp.asarray(stream[:cut], jnp.int32), jnp.asarray(stream[cut:], jnp.int32)

    def draw(key: jax.Array, size: int) -> jax.Array:
        starts = jax.random.randint(key, (size, 1), 0, len(train) - LENGTH - 1)
        return train[starts + jnp.arange(LENGTH + 1)]

    cross_entropy = LOSSES["ours" if modules is layers else "flax"]

    def loss(model: Any, batch: Any) -> jax.Array:
        with routing_losses() as losses:
            return sum(losses, cross_entropy(model, batch))

    def validate(model: Any) -> dict[str, jax.Array]:
        count = min(16, len(test) // (LENGTH + 1))
        value = cross_entropy(model, test[: count * (LENGTH + 1)].reshape(count, LENGTH + 1))
        return {"loss": value, "bits_per_byte": value / np.log(2)}

    return Task(model, draw, loss, validate, "bytes", LENGTH, 300, 16, digest(stream))


TASKS: dict[str, Callable[[ModuleType], Task]] = {"digits": digits, "text": text, "text-fp8": text_fp8, "text-moe": text_moe, "grpo": backwards}
