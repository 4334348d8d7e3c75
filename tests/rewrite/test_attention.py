"""Attention as people write it is found, and what only looks like it is not."""

import jax
import jax.numpy as jnp
import pytest

import layers
from tests.rewrite.support import assert_same, assert_same_value, reasons, replaced

CASES = {}
keys = iter(jax.random.split(jax.random.key(0), 200))


def case(expected, *args):
    def add(fn):
        CASES[fn.__name__] = fn, expected, args
        return fn

    return add


def rnd(*shape, dtype=jnp.float32):
    return jax.random.normal(next(keys), shape).astype(dtype)


q, k, v = rnd(2, 16, 4, 8), rnd(2, 16, 4, 8), rnd(2, 16, 4, 8)
k2, v2 = rnd(2, 16, 2, 8), rnd(2, 16, 2, 8)
pad, dead = (jnp.arange(16)[None] < jnp.array([[n], [9]]) for n in (16, 0))
softmax = jax.nn.softmax


def tril(t):
    return jnp.tril(jnp.ones((t, t), bool))


def scores(q, k):
    return jnp.einsum("btnh,bsnh->bnts", q, k)


def output(p, v):
    return jnp.einsum("bnts,bsnh->btnh", p, v)


@case("dot_product_attention", q, k, v)
def no_mask(q, k, v):
    return output(softmax(scores(q, k) / 8**0.5), v)


@case("dot_product_attention", q, k, v)
def causal_inf(q, k, v):
    return output(softmax(jnp.where(tril(16), scores(q, k) * 0.3, -jnp.inf)), v)


@case("dot_product_attention", q, k, v)
def manual_softmax(q, k, v):
    s = jnp.where(tril(16), scores(q, k) * 0.3, -1e10)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return output(e / e.sum(-1, keepdims=True), v)


@case("dot_product_attention", q, k, v, pad)
def causal_and_padding(q, k, v, pad):
    return output(softmax(jnp.where(tril(16) & pad[:, None, None], scores(q, k) * 0.3, -1e9)), v)


@case("dot_product_attention", q, k, v, dead)
def rows_that_see_nothing(q, k, v, pad):
    return output(softmax(jnp.where(tril(16) & pad[:, None, None], scores(q, k) * 0.3, -1e9)), v)


@case("dot_product_attention", q, k, v, pad)
def additive_mask(q, k, v, pad):
    return output(softmax(scores(q, k) * 0.3 + jnp.where(pad, 0, -1e9)[:, None, None]), v)


@case("dot_product_attention", q, k, v, rnd(4, 16, 16))
def relative_bias(q, k, v, r):
    return output(softmax(scores(q, k) * 0.3 + r), v)


@case("dot_product_attention", q, k2, v2)
def grouped(q, k, v):
    g = q.reshape(2, 16, 2, 2, 8)
    s = jnp.einsum("btkgh,bskh->bkgts", g, k) * 0.3
    return jnp.einsum("bkgts,bskh->btkgh", softmax(jnp.where(tril(16), s, -1e30)), v).reshape(2, 16, 4, 8)


@case("dot_product_attention", q, k2, v2)
def repeated(q, k, v):
    k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
    return output(softmax(jnp.where(tril(16), scores(q, k), -1e30)), v)


@case("dot_product_attention", q, k, v)
def heads_first(q, k, v):
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    return (softmax(q @ k.swapaxes(-1, -2) * 0.3) @ v).transpose(0, 2, 1, 3).reshape(2, 16, 32)


@case("dot_product_attention", q[:, :, 0], k[:, :, 0], v[:, :, 0])
def one_head(q, k, v):
    return softmax(jnp.tanh(q @ k.swapaxes(1, 2) / 3) * 3) @ v


@case("dot_product_attention", q[0, :, 0], k[0, :, 0], v[0, :, 0])
def one_sequence(q, k, v):
    return softmax(jnp.where(tril(16), q @ k.T, -1e30)) @ v


@case("dot_product_attention", q, k, v)
def softmax_axis_1(q, k, v):
    return jnp.einsum("bsnt,bsnh->btnh", softmax(jnp.einsum("btnh,bsnh->bsnt", q, k), 1), v)


@case("dot_product_attention", q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
def bfloat16(q, k, v):
    return output(softmax(jnp.where(tril(16), scores(q, k).astype(jnp.float32) * 0.3, -1e30)).astype(v.dtype), v)


@case("dot_product_attention", q, k, v)
def window(q, k, v):
    i = jnp.arange(16)
    d = i[:, None] - i
    return output(softmax(jnp.where((d >= 0) & (d < 5), scores(q, k), -1e30)), v)


@case("dot_product_attention", rnd(2, 4, 4, 8), k, v)
def last_queries(q, k, v):
    return output(softmax(jnp.where(jnp.arange(4)[:, None] + 12 >= jnp.arange(16), scores(q, k), -1e30)), v)


@case("dot_product_attention", q, k, v, jnp.array([[0] * 9 + [1] * 7, [0] * 16]))
def packed(q, k, v, seg):
    return output(softmax(jnp.where((seg[:, :, None] == seg[:, None])[:, None] & tril(16), scores(q, k), -1e30)), v)


@case("", q, k, v)
def weights_returned(q, k, v):
    p = softmax(scores(q, k))
    return output(p, v), p


@case("", q, k, v)
def scores_returned(q, k, v):
    s = scores(q, k)
    return output(softmax(s), v), s.sum()


@case("", q, k, v)
def wrong_softmax_axis(q, k, v):
    return output(softmax(scores(q, k), 2), v)


@case("", q, k, v)
def softmax_over_heads(q, k, v):
    return output(softmax(scores(q, k), 1), v)


@case("", q, k, v)
def mean_not_max(q, k, v):
    s = scores(q, k)
    e = jnp.exp(s - s.mean(-1, keepdims=True))
    return output(e / e.sum(-1, keepdims=True), v)


@case("", q, k, v)
def other_sum(q, k, v):
    s = scores(q, k)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return output(e / e.sum(2, keepdims=True), v)


@case("", *(a[:, :4] for a in (q, k, v)))
def maxima_shuffled(q, k, v):
    s = scores(q, k)
    m = s.max(-1).swapaxes(1, 2)[..., None]
    e = jnp.exp(s - jax.lax.stop_gradient(m))
    return output(e / e.sum(-1, keepdims=True), v)


@case("", *(a[:, :4] for a in (q, k, v)))
def sums_shuffled(q, k, v):
    s = scores(q, k)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return output(e / e.sum(-1).swapaxes(1, 2)[..., None], v)


@case("", q, k, v)
def small_mask_number(q, k, v):
    return output(softmax(jnp.where(tril(16), scores(q, k), -5.0)), v)


@case("dot_product_attention", q, k, v)
def mask_to_zero(q, k, v):
    return output(jnp.where(tril(16), softmax(scores(q, k)), 0), v)


@case("", q, k, v)
def renormalised(q, k, v):
    p = softmax(scores(q, k))
    p = p / (1 + p.sum(-1, keepdims=True))
    return output(p, v)


@case("", q, k, v)
def high_precision(q, k, v):
    return output(softmax(jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")), v)


@case("", q, k, v)
def values_transposed(q, k, v):
    return jnp.einsum("bnts,btnh->bsnh", softmax(scores(q, k)), v)


@case("dot_product_attention", q)
def one_array_for_all(q):
    return output(softmax(scores(q, q)), q)


@case("dot_product_attention", q, rnd(2, 5, 4, 8), rnd(2, 5, 4, 8))
def more_queries_than_keys(q, k, v):
    return output(softmax(jnp.where(jnp.arange(16)[:, None] >= jnp.arange(5) + 3, scores(q, k), -1e30)), v)


@case("dot_product_attention", q, k, v)
def negative_scale(q, k, v):
    return output(softmax(scores(q, k) * -0.5), v)


@case("dot_product_attention", rnd(2, 3, 9, 2, 8), rnd(2, 3, 9, 2, 8), rnd(2, 3, 9, 2, 8))
def two_batch_axes(q, k, v):
    return jnp.einsum("abnts,absnh->abtnh", softmax(jnp.where(tril(9), jnp.einsum("abtnh,absnh->abnts", q, k), -1e30)), v)


@case("dot_product_attention", rnd(2, 3, 4, 2, 8), rnd(2, 3, 4, 2, 8), rnd(2, 3, 4, 2, 8))
def two_axes_of_positions(q, k, v):
    s = jnp.einsum("byxnh,bvunh->bnyxvu", q, k)
    p = softmax(s.reshape(2, 2, 3, 4, 12)).reshape(s.shape)
    return jnp.einsum("bnyxvu,bvunh->byxnh", p, v)


@case("dot_product_attention", q, k, v)
def vmapped(q, k, v):
    return jax.vmap(jax.vmap(lambda q, k, v: softmax(q @ k.T / 3) @ v, 1, 1))(q, k, v)


@case("dot_product_attention", q, k, v)
def library_of_jax(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@case("dot_product_attention", q.astype(jnp.float16), k.astype(jnp.float16), v.astype(jnp.float16))
def float16(q, k, v):
    return output(softmax(jnp.where(tril(16), scores(q, k), jnp.finfo(jnp.float16).min)), v)


@case("", q, k, v)
def two_softmaxes(q, k, v):
    s = scores(q, k)
    return output(softmax(s), v) - output(softmax(2 * s), v)


@case("", q, k, v)
def product_of_two_scores(q, k, v):
    return output(softmax(scores(q, k) * scores(k, q)), v)


@case("", q, k, v)
def learned_scale_after_mask(q, k, v):
    return output(softmax(jnp.where(tril(16), scores(q, k), -1e30) * jnp.exp(q[0, 0, 0, 0])), v)


@case("dot_product_attention", q, k2, v2, rnd(4))
def sinks_as_a_column(q, k, v, sinks):
    k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
    s = jnp.where(tril(16), scores(q, k) * 0.3, -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:-1], 1))
    return output(softmax(jnp.concatenate([s, column], -1))[..., :-1], v)


@case("dot_product_attention", q, k, v)
def mask_by_multiplication(q, k, v):
    m = tril(16).astype(q.dtype)
    return output(softmax(scores(q, k) * m - 1e10 * (1 - m)), v)


@case("", q, k, v)
def mask_by_multiplication_that_hides_elsewhere(q, k, v):
    m = tril(16).astype(q.dtype)
    return output(softmax(scores(q, k) * m - 1e10 * (1 - m.T)), v)


@case("dot_product_attention", q, k, v)
def mask_by_addition(q, k, v):
    return output(softmax(scores(q, k) + jnp.where(tril(16), 0, -1e9)), v)


@case("", q, k, v)
def mask_by_addition_that_hides_whole_rows(q, k, v):
    return output(softmax(scores(q, k) + jnp.where(jnp.arange(16)[:, None] > 3, 0, -1e9)), v)


@case("dot_product_attention", q, k, v)
def mask_that_only_looks_causal(q, k, v):
    return output(softmax(jnp.where(tril(16).at[3, 1].set(False), scores(q, k), -jnp.inf)), v)


@pytest.mark.parametrize("name", CASES)
def test_part_is_replaced_where_it_fits_and_nothing_changes(name, everything_pays):
    fn, expected, args = CASES[name]
    assert replaced(fn, *args, skip=("elementwise", "product")) == expected.split()
    assert_same(fn, args) if expected else assert_same_value(fn, args)


def test_masks_are_read_off():
    def detail(name):
        fn, _, args = CASES[name]
        (row,) = layers.rewrite(fn).report(*args).replaced
        return row.detail

    assert detail("causal_inf") == detail("manual_softmax") == "scale 0.3, causal"
    assert detail("mask_by_addition") == detail("mask_by_multiplication") == "scale 1, causal"
    assert detail("window") == "scale 1, causal, window (4, 0)"
    assert detail("sinks_as_a_column") == "scale 0.3, causal, sinks"
    assert detail("mask_that_only_looks_causal") == "scale 1, mask"
    assert detail("packed") == "scale 1, causal, mask"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("weights_returned", "the weights are read elsewhere too"),
        ("small_mask_number", "hidden scores become -5, which does not hide them"),
        ("wrong_softmax_axis", "the softmax is not over"),
        ("high_precision", "the product of queries and keys has a precision"),
    ],
)
def test_reason_says_why_a_part_was_left(name, reason):
    fn, _, args = CASES[name]
    assert any(r.startswith(reason) for r in reasons(fn, *args))
