"""Models as people write them, at the size that the README names: what a training step takes, plain and rewritten, as its table says."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import layers
from tests.rewrite import plain_llama
from tests.support import temp_bytes

pytest.importorskip("optax")
pytest.importorskip("equinox")

from tests.rewrite.models import encoder, gemma, gpt2, hybrid, qwen, vision, whisper

README = Path(__file__).parents[2] / "README.md"
SIZE = {"batch": 4, "length": 512, "width": 256, "depth": 4, "vocab": 8000}


def make_llama(key, *, batch, length, width, depth, vocab):
    return plain_llama.loss, plain_llama.init(key, depth, width, vocab), jnp.zeros((batch, length + 1), jnp.int32)


MODELS = {
    "Llama, plain JAX": (make_llama, 0.24),
    "Gemma, nnx: soft caps, windows": (gemma.make, 0.25),
    "Qwen, nnx: norms of queries and keys": (qwen.make, 0.3),
    "GPT-2": (gpt2.make, 0.24),
    "GPT-2 with dropout": (functools.partial(gpt2.make, rate=0.1), 0.3),
    "Whisper: cross attention": (whisper.make, 0.24),
    "ViT, nnx": (vision.make_vit, 0.3),
    "Mixer, Equinox": (vision.make_mixer, 0.48),
    "hybrid, a scan over layers": (hybrid.make, 0.35),
    "encoder, Linen: padding, smoothed labels": (encoder.make, 0.35),
    "the encoder with dropout, of weights too": (functools.partial(encoder.make, rate=0.1), 0.48),
}


def as_it_is(fn):
    return fn


@functools.cache
def step_bytes(make, change=as_it_is):
    """The temporary memory of a training step of the model, whose loss is changed so; it is compiled, and no array is made."""
    losses = []

    def arrays(key):
        loss, *arguments = make(key, **SIZE)
        losses.append(loss)
        return arguments

    arguments = jax.eval_shape(arrays, jax.random.key(0))
    return temp_bytes(jax.value_and_grad(change(losses[0])), *arguments)


@pytest.mark.parametrize("name", MODELS)
def test_step_takes_what_the_readme_says(name):
    make, bound = MODELS[name]
    plain, new = step_bytes(make), step_bytes(make, layers.rewrite)
    assert new <= bound * plain
    stated = re.search(rf"^\| {re.escape(name)} \| (\d+) \| (\d+) \|", README.read_text(), re.MULTILINE)
    assert stated is not None
    assert [int(n) for n in stated.groups()] == pytest.approx([plain / 2**20, new / 2**20], rel=0.03)


def test_gemma_takes_the_memory_of_its_port_by_hand():
    port = step_bytes(functools.partial(gemma.make, is_port=True))
    assert step_bytes(gemma.make, layers.rewrite) <= 1.03 * port


def test_port_of_the_gemma_has_its_loss():
    size = {"batch": 1, "length": 8, "width": 16, "depth": 2, "vocab": 30}
    loss, params, tokens = gemma.make(jax.random.key(0), **size)
    port = gemma.make(jax.random.key(0), **size, is_port=True)[0]
    plain, by_hand = jax.jit(lambda *args: (loss(*args), port(*args)))(params, tokens)
    assert float(by_hand) == pytest.approx(float(plain), rel=1e-5)
