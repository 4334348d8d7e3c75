"""A Llama as people write it, looped over or not, takes the memory of one that was ported by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

import layers
from tests.rewrite import plain_llama
from tests.support import temp_bytes

TOKENS = jax.ShapeDtypeStruct((4, 513), jnp.int32)


def step_bytes(loss):
    params = jax.eval_shape(plain_llama.init, jax.random.key(0))
    return temp_bytes(jax.value_and_grad(loss), params, TOKENS)


def test_llama_takes_the_memory_of_its_port_by_hand():
    assert step_bytes(layers.rewrite(plain_llama.loss)) <= 1.03 * step_bytes(plain_llama.hand_loss)


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
