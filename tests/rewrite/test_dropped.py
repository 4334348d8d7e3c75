"""Dropout of the weights of attention is found as people write it: with the same mask, kept as booleans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from tests.rewrite.support import assert_same, reasons, replaced

RNG = np.random.default_rng(0)
q, k, v = (jnp.asarray(RNG.normal(size=(2, 8, 2, 4)), jnp.float32) for _ in range(3))
TRIL = jnp.tril(jnp.ones((8, 8), bool))
MASK = jnp.asarray(RNG.random((1, 1, 8, 8)) > 0.3).at[0, 0, 2].set(False)


def drawn(*shape):
    return jax.random.bernoulli(jax.random.key(0), 0.9, shape)


def attend(drop, seen=None):
    def fn(q, k, v, *seen_too):
        s = jnp.einsum("btnh,bsnh->bnts", q, k)
        for mask in (*([] if seen is None else [seen]), *seen_too):
            s = jnp.where(mask, s, -1e9)
        return jnp.einsum("bnts,bsnh->btnh", drop(jax.nn.softmax(s)), v)

    return fn


FOUND = {
    "multiplier": attend(lambda w: w * (drawn(2, 2, 8, 8).astype(w.dtype) / 0.9)),
    "multiplier, causal": attend(lambda w: w * drawn(2, 2, 8, 8) * (1 / 0.9), TRIL),
    "where": attend(lambda w: jnp.where(drawn(2, 2, 8, 8), w / 0.9, 0)),
    "where, scaled after": attend(lambda w: jnp.where(drawn(2, 2, 8, 8), w, 0) / 0.9),
    "where of the dropped": attend(lambda w: jnp.where(drawn(2, 2, 8, 8), 0, w / 0.1)),
    "numbers chosen": attend(lambda w: w * jnp.where(drawn(2, 2, 8, 8), 1 / 0.9, 0)),
    "shared by heads": attend(lambda w: jnp.where(jnp.broadcast_to(drawn(2, 1, 8, 8), w.shape), w / 0.9, 0)),
}
LEFT = {
    "other numbers": attend(lambda w: w * jax.random.uniform(jax.random.key(0), w.shape)),
    "no zeros": attend(lambda w: jnp.where(drawn(2, 2, 8, 8), w, 1e-3)),
    "made smaller": attend(lambda w: jnp.where(drawn(2, 2, 8, 8), 0.5 * w, 0)),
    "twice": attend(lambda w: w * drawn(2, 2, 8, 8) * jax.random.bernoulli(jax.random.key(1), 0.5, (2, 2, 8, 8))),
    "a quotient": attend(lambda w: 1 / (1 + w)),
}


@pytest.mark.parametrize("way", FOUND)
def test_dropout_is_found_with_its_own_mask(way, everything_pays):
    assert replaced(FOUND[way], q, k, v, skip=("elementwise", "product")) == ["dot_product_attention"]
    assert_same(FOUND[way], (q, k, v))


@pytest.mark.parametrize("seen", [None, TRIL])
def test_a_query_that_sees_nothing_has_the_mean_of_the_values_that_are_left(seen, everything_pays):
    fn = attend(lambda w: jnp.where(drawn(2, 2, 8, 8), w / 0.9, 0), seen)
    assert replaced(fn, q, k, v, MASK, skip=("elementwise", "product")) == ["dot_product_attention"]
    plain, new = (jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2)))(q, k, v, MASK) for f in (fn, layers.rewrite(fn)))
    for a, e in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", LEFT)
def test_what_is_no_dropout_stays_with_the_reason(way, everything_pays):
    assert replaced(LEFT[way], q, k, v, skip=("elementwise", "product")) == []
    assert any("the weights" in r for r in reasons(LEFT[way], q, k, v))


def test_booleans_are_kept_in_place_of_weights():
    x = jax.ShapeDtypeStruct((2, 256, 4, 16), jnp.float32)
    fn = attend(lambda w: jnp.where(drawn(2, 4, 256, 256), w / 0.9, 0))
    plain, new = (layers.residuals(f, x, x, x).extra for f in (fn, layers.rewrite(fn)))
    mask, weights, output = 2 * 4 * 256**2, 4 * 2 * 4 * 256**2, 4 * x.size
    assert plain >= mask + weights
    assert new <= mask + 2 * output
