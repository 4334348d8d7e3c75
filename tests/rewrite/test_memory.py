"""A model as people write it takes the memory of one that was ported by hand, at the size that the README names."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import layers
from tests.rewrite import plain_llama
from tests.support import temp_bytes

README = Path(__file__).parents[2] / "README.md"
TOKENS = jax.ShapeDtypeStruct((4, 513), jnp.int32)


def step_bytes(loss):
    params = jax.eval_shape(plain_llama.init, jax.random.key(0))
    return temp_bytes(jax.value_and_grad(loss), params, TOKENS)


@pytest.fixture(scope="module")
def plain_bytes():
    return step_bytes(plain_llama.loss)


@pytest.fixture(scope="module")
def rewritten_bytes():
    return step_bytes(layers.rewrite(plain_llama.loss))


def test_llama_takes_the_memory_of_its_port_by_hand(plain_bytes, rewritten_bytes):
    assert rewritten_bytes <= 1.03 * step_bytes(plain_llama.hand_loss)
    assert rewritten_bytes <= 0.24 * plain_bytes


def test_readme_says_what_the_llama_takes(plain_bytes, rewritten_bytes):
    found = re.search(r"takes (\d+) MiB of temporary memory in a training step,\s+rewritten (\d+) MiB", README.read_text())
    stated = [int(n) for n in found.groups()]
    assert stated == pytest.approx([plain_bytes / 2**20, rewritten_bytes / 2**20], rel=0.03)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_takes_less(remat):
    loss = functools.partial(plain_llama.scanned_loss, remat=remat)
    assert step_bytes(layers.rewrite(loss)) <= 0.24 * step_bytes(loss)


def test_every_part_of_the_llama_is_replaced():
    params = jax.eval_shape(plain_llama.init, jax.random.key(0))
    report = layers.rewrite(plain_llama.loss).report(params, TOKENS)
    names = [r.name for r in report.replaced]
    assert {n: names.count(n) for n in names} == {"dot_product_attention": 4, "rms_norm": 9, "gated_mlp": 4, "linear_cross_entropy": 1}
    assert all("causal" in r.detail for r in report.replaced if r.name == "dot_product_attention")
    assert not report.left
    assert report.after < report.before / 4
