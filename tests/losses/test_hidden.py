"""What does not count is not touched: rows that are ignored, masked or of weight 0 may hold NaN and infinity, in values, gradients and tangents."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.linear_jsd import linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence
from layers.losses.linear_log_prob import linear_log_prob
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from tests.losses.reference import jit_quickly
from tests.support import assert_trees_close, draw_normal, jit_value_and_grad

ROWS, FEATURES, VOCAB = 5, 3, 4
HIDDEN = jnp.array([False, True, False, False, True])
LABELS = jnp.array([2, 1, 0, 3, 3])
IGNORED, EVERY = jnp.where(HIDDEN, -100, LABELS), {"label_smoothing": 0.1, "z_loss": 0.1, "logit_soft_cap": 3.0}


def draw(seed, *shape):
    return draw_normal(seed, shape)


def spoiled(x, number):
    return jnp.where(HIDDEN[:, None], number, x)


X, KERNEL, LOGITS, SOFT = draw(1, ROWS, FEATURES), draw(2, FEATURES, VOCAB), draw(3, ROWS, VOCAB), jax.nn.softmax(draw(4, ROWS, VOCAB))
TX, TK = draw(5, ROWS, 2), draw(6, 2, VOCAB)
where = ~HIDDEN
CASES = {
    "linear, ignored": (lambda x, k, **o: linear_cross_entropy(x, k, IGNORED, **o), (X, KERNEL)),
    "linear, every option": (lambda x, k, **o: linear_cross_entropy(x, k, IGNORED, **EVERY, **o), (X, KERNEL)),
    "linear, weight 0": (lambda x, k, **o: linear_cross_entropy(x, k, jnp.where(HIDDEN, 77, LABELS), where=where, **o), (X, KERNEL)),
    "linear, distributions": (lambda x, k, q, **o: linear_cross_entropy(x, k, q, where=where, **EVERY, **o), (X, KERNEL, SOFT)),
    "logits, ignored": (lambda a, **o: softmax_cross_entropy(a, IGNORED, **o), (LOGITS,)),
    "logits, every option": (lambda a, **o: softmax_cross_entropy(a, IGNORED, **EVERY, **o), (LOGITS,)),
    "logits, distributions": (lambda a, q, **o: softmax_cross_entropy(a, q, where=where, **o), (LOGITS, SOFT)),
    "jsd": (lambda x, k, tx, **o: linear_jsd(x, k, tx, TK, mask=where, **o), (X, KERNEL, TX)),
    "jsd, weights": (lambda x, k, tx, **o: linear_jsd(x, k, tx, TK, where=where.astype(float), beta=1.0, **o), (X, KERNEL, TX)),
    "kl": (lambda x, k, tx, **o: linear_kl_divergence(x, k, tx, TK, where=where.astype(int), temperature=2.0, **o), (X, KERNEL, TX)),
}


def everything(loss, args, tangents, dloss):
    """Loss, gradients and tangent."""
    value, pull = jax.vjp(loss, *args)
    return value, pull(dloss), jax.jvp(loss, args, tangents)[1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CASES)
def test_hidden_rows_are_not_touched(name, reduction):
    loss, args = CASES[name]
    run = jit_quickly(partial(everything, partial(loss, reduction=reduction, block_size=2)))

    def found(number):
        """With that number in the hidden rows of arguments, tangents and the gradient that arrives."""
        each = lambda arrays: tuple(spoiled(x, number) if x.shape[0] == ROWS else x for x in arrays)
        dloss = jnp.cos(jnp.arange(5.0))
        return run(each(args), each(jnp.cos(3 * x) for x in args), dloss[0] if reduction == "mean" else jnp.where(HIDDEN, number, dloss))

    expected = found(0.0)
    for number in (jnp.nan, jnp.inf, -jnp.inf):
        given = found(number)
        assert_trees_close(given, expected, rtol=1e-5, atol=1e-6)
        assert not any(jnp.isnan(y).any() for y in jax.tree.leaves(given))
        assert not any(g[HIDDEN].any() for g in given[1] if g.shape[0] == ROWS)


@pytest.mark.parametrize("option", ["return_logsumexp", "return_entropy"])
@pytest.mark.parametrize("name", ["linear, ignored", "logits, every option"])
def test_hidden_row_of_which_nothing_is_used_has_no_gradient_though_its_logsumexp_and_entropy_are_returned(name, option):
    loss, args = CASES[name]

    def total(*args):
        rows, more = loss(*args, reduction="none", block_size=2, **{option: True})
        return rows.sum() + jnp.where(HIDDEN, 0, more).sum()

    given, expected = (jit_quickly(jit_value_and_grad(total, tuple(range(len(args)))))(spoiled(args[0], n), *args[1:]) for n in (jnp.nan, 0.0))
    assert_trees_close(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, lambda a, q, **o: linear_cross_entropy(a, jnp.eye(VOCAB), q, jnp.zeros(VOCAB), **o)])
def test_zero_tangent_of_a_label_outweighs_a_class_that_is_impossible(loss):
    logits = LOGITS.at[:, 1].set(-jnp.inf) if loss is softmax_cross_entropy else LOGITS.at[:, 1].set(-3e38)
    labels = SOFT.at[:, 1].set(0) / SOFT.at[:, 1].set(0).sum(-1, keepdims=True)
    along = jnp.cos(3 * SOFT).at[:, 1].set(0)
    tangent = jax.jvp(lambda a, q: loss(a, q, reduction="none"), (logits, labels), (jnp.zeros_like(logits), along))[1]
    expected = -(along * jnp.where(jnp.arange(VOCAB) == 1, 0, jax.nn.log_softmax(logits))).sum(-1)
    np.testing.assert_allclose(tangent, expected, rtol=1e-5)


def test_zero_tangent_of_a_label_outweighs_an_infinite_bias():
    bias = jnp.zeros(VOCAB).at[1].set(-jnp.inf)
    labels = SOFT.at[:, 1].set(0)
    loss = lambda q: linear_cross_entropy(X, KERNEL, q, bias, reduction="sum")
    tangent = jax.jvp(loss, (labels,), (jnp.ones_like(labels).at[:, 1].set(0),))[1]
    np.testing.assert_allclose(tangent, -jnp.delete(jax.nn.log_softmax(X @ KERNEL + bias), 1, 1).sum(), rtol=1e-5)
    assert jax.jvp(loss, (labels,), (jnp.zeros_like(labels),))[1] == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("loss", [linear_jsd, partial(linear_jsd, beta=1.0), linear_kl_divergence])
def test_huge_logits_and_a_temperature_give_the_right_divergence_when_compiled(loss, temperature):
    a, b = (1e9 * draw(i, 8, 5) for i in (0, 1))
    run = jit_value_and_grad(lambda a: loss(a, jnp.eye(5), b, jnp.eye(5), temperature=temperature, reduction="none").sum())
    value, gradient = jax.jit(run)(a)
    with jax.enable_x64(True):
        a, b = (x.astype(jnp.float64) for x in (a, b))
        exact = jit_value_and_grad(lambda a: loss(a, jnp.eye(5), b, jnp.eye(5), temperature=temperature, reduction="none").sum())(a)
        value_of, gradient_of = np.asarray(exact[0]), np.asarray(exact[1])
    np.testing.assert_allclose(value, value_of, rtol=1e-5)
    np.testing.assert_allclose(gradient, gradient_of, rtol=1e-5, atol=1e-5 * np.abs(gradient_of).max())


@pytest.mark.parametrize("cap", [None, 1e9])
def test_huge_logits_give_finite_gradients_when_they_are_computed_twice(cap):
    x, kernel, bias = 1e9 * draw(0, 64, 8), draw(1, 8, 16), 1e8 * draw(2, 16)
    loss = lambda x, k, b: linear_cross_entropy(x, k, jnp.arange(64) % 16, b, reduction="none", logit_soft_cap=cap).sum() / 1e9
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, kernel, bias)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert jnp.abs(gradients[2]).max() <= 64 / 1e9


def test_row_with_nan_is_no_hit_and_its_label_not_the_best():
    logits, labels = jnp.array([[jnp.nan, 1.0, 2.0], [0.5, jnp.nan, 0.1], [1.0, 5.0, 2.0]]), jnp.array([0, 0, 1])
    hits = softmax_cross_entropy(logits, labels, reduction="none", return_accuracy=True)[1]
    np.testing.assert_array_equal(hits, [0, 0, 1])
    rank = linear_log_prob(jnp.array([[1.0], [jnp.nan]]), jnp.array([[0.0, 1.0, 2.0]]), jnp.array([2, 2]), return_rank=True)[1]
    np.testing.assert_array_equal(rank, [0, 2])
