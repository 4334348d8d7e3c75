"""The drop-in for `flax.nnx.MultiHeadAttention`, against it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from layers import MultiHeadAttention
from tests.support import assert_trees_close, draw_normal

FEATURES, TIME = 8, 5


step = nnx.jit(lambda module, x, **options: module(x, **options), static_argnames="is_causal")
"""A call that decodes one step."""


def pair(**options: Any) -> tuple[nnx.Module, nnx.Module]:
    return tuple(
        cls(num_heads=4, in_features=FEATURES, rngs=nnx.Rngs(0), **{"decode": False} | options)
        for cls in (nnx.MultiHeadAttention, MultiHeadAttention)
    )


@pytest.mark.parametrize(
    "options", [{}, {"normalize_qk": True, "use_bias": False, "qkv_features": 16}, {"num_kv_heads": 2, "qkv_features": 16, "out_features": 3}]
)
@pytest.mark.parametrize("batch, causal", [((), False), ((2,), True), ((2, 3), False)])
def test_values_and_gradients_are_those_of_flax(options: dict[str, Any], batch: tuple[int, ...], causal: bool) -> None:
    x = draw_normal(1, (*batch, TIME, FEATURES))
    mask = nnx.make_attention_mask(jnp.ones((*batch, TIME)), jnp.broadcast_to(jnp.arange(TIME) < 3, (*batch, TIME))) if not causal else None

    @nnx.jit
    def run(module):
        return nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(x, mask=mask, is_causal=causal))))(module)

    flax, ours = (run(m) for m in pair(**options))
    assert_trees_close(nnx.to_pure_dict(ours[1]), nnx.to_pure_dict(flax[1]), rtol=1e-4, atol=1e-4)
    assert_trees_close(ours[0], flax[0], rtol=1e-5)


@pytest.mark.parametrize("head_dim", [2, 4])
def test_normalised_queries_and_keys_are_those_of_flax_in_float64(head_dim: int) -> None:
    """With two features a norm gives (1, -1) or (-1, 1) but for epsilon, and its gradient is all but 0: in float32 what is left of it is rounding.

    `jax.nn`, which Flax calls, takes its softmax in float32 always, so the reference has it written out.
    """

    def softmax_attention(q, k, v, **_):
        p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", p, v)

    with jax.enable_x64(True):
        x = draw_normal(1, (2, TIME, FEATURES), jnp.float64)
        options = {"normalize_qk": True, "qkv_features": 4 * head_dim, "param_dtype": jnp.float64}
        modules = pair(**options, attention_fn=softmax_attention)[0], pair(**options)[1]
        both = [nnx.jit(nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(x)))))(module) for module in modules]
        assert_trees_close(nnx.to_pure_dict(both[1][1]), nnx.to_pure_dict(both[0][1]), rtol=1e-9, atol=1e-10)
        assert_trees_close(both[1][0], both[0][0], rtol=1e-12)


def test_decoding_step_by_step_is_that_of_flax() -> None:
    flax, ours = pair(decode=True, num_kv_heads=2)
    x = draw_normal(1, (2, TIME, FEATURES))
    for module in (flax, ours):
        module.init_cache(x.shape)
    for t in range(TIME):
        assert_trees_close(step(ours, x[:, t : t + 1]), step(flax, x[:, t : t + 1]), rtol=1e-4, atol=1e-4)
    assert_trees_close(ours.cached_key[...], flax.cached_key[...], rtol=0)


def test_decoding_sees_every_key_so_far_though_it_is_called_causal() -> None:
    """As in Flax from 0.12.12 on; before, the one query saw the first key only."""
    _, causal = pair(decode=True)
    _, plain = pair(decode=True)
    x = draw_normal(1, (2, TIME, FEATURES))
    for module in (causal, plain):
        module.init_cache(x.shape)
    for t in range(TIME):
        assert_trees_close(causal(x[:, t : t + 1], is_causal=True), plain(x[:, t : t + 1]), rtol=1e-6)
    whole = pair()[1](x, is_causal=True)
    assert_trees_close(causal(x[:, -1:], decode=False, is_causal=True), pair()[1](x[:, -1:], is_causal=True), rtol=1e-6)
    plain.init_cache(x.shape)
    assert_trees_close(jnp.concatenate([plain(x[:, t : t + 1], is_causal=True) for t in range(TIME)], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_weights_are_sown_where_asked_for() -> None:
    _, module = pair()
    module(jnp.ones((1, TIME, FEATURES)), sow_weights=True)
    assert module.attention_weights[0].shape == (1, 4, TIME, TIME)


def test_dropout_acts_only_in_training() -> None:
    _, module = pair(dropout_rate=0.5)
    x = draw_normal(1, (2, TIME, FEATURES))
    still = module(x, deterministic=True)
    assert bool((module(x, deterministic=False) != still).any()) and bool((module(x, deterministic=True) == still).all())


def test_precision_with_dropout_is_that_of_flax() -> None:
    products = []
    for module in pair(precision=jax.lax.Precision.HIGHEST, dropout_rate=0.5):
        text = str(jax.make_jaxpr(lambda x, module=module: module(x, deterministic=False, rngs=nnx.Rngs(1)))(jnp.ones((2, 3, 8))))
        products.append(text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)"))
    assert products[0] == products[1] > 0


def test_another_attention_fn_is_called() -> None:
    _, module = pair(attention_fn=lambda q, *_, **__: jnp.zeros_like(q), use_bias=False)
    assert not module(jnp.ones((1, TIME, FEATURES))).any()
