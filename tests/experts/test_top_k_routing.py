"""Routing against its formulas written plainly in float64; capacity and padding against loops of Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.experts.top_k_routing import top_k_routing
from tests.support import assert_trees_close

T, E, K = 7, 5, 2
rng = np.random.default_rng(0)
LOGITS, BIAS, WEIGHTS = rng.normal(size=(T, E)), 0.3 * rng.normal(size=E), rng.normal(size=(T, K))


def plain(logits, scores, normalize, bias=0.0):
    s = jax.nn.softmax(logits) if scores == "softmax" else jax.nn.sigmoid(logits)
    chosen = jnp.argsort(-(s + bias), stable=True)[:, :K]
    w = jnp.take_along_axis(s, chosen, 1)
    w = w / w.sum(-1, keepdims=True) if normalize else w
    p = s / s.sum(-1, keepdims=True)
    shares = jnp.bincount(chosen.reshape(-1), length=E) / (T * K)
    return chosen, w, E * (shares * p.mean(0)).sum(), (jax.nn.logsumexp(logits, -1) ** 2).mean()


def loss(found):
    return (found[1] * WEIGHTS).sum() + 0.3 * found[2] + 0.7 * found[3]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_choices_weights_and_losses_and_all_derivatives_are_those_of_the_formulas(scores, normalize):
    with jax.enable_x64(True):

        def ours(logits):
            found = top_k_routing(logits, K, scores=scores, normalize=normalize, bias=BIAS)
            return found.indices, found.weights, found.balance_loss, found.z_loss

        def run(fn):
            slope = jax.grad(lambda a: loss(fn(a)))
            return fn(LOGITS), slope(LOGITS), jax.jvp(slope, (LOGITS,), (LOGITS[::-1],))[1]

        assert_trees_close(jax.jit(lambda: run(ours))(), jax.jit(lambda: run(lambda a: plain(a, scores, normalize, BIAS)))(), rtol=1e-10, atol=1e-12)


def test_counts_are_the_tokens_of_each_expert_and_an_even_choice_has_a_balance_of_one():
    found = top_k_routing(jnp.asarray(LOGITS), K)
    np.testing.assert_array_equal(found.counts, np.bincount(np.asarray(found.indices).reshape(-1), minlength=E))
    even = top_k_routing(1e-3 * jnp.eye(4), 1)
    np.testing.assert_allclose(even.balance_loss, 1, rtol=1e-5)
    assert top_k_routing(jnp.tile(9 * jnp.eye(4)[:1], (4, 1)), 1).balance_loss > 3.9


@pytest.mark.parametrize("capacity", [0, 1, 2, 100])
def test_choices_beyond_the_capacity_are_dropped_second_ones_first(capacity):
    free, found = (top_k_routing(jnp.asarray(LOGITS), K, capacity=c) for c in (None, capacity))
    expected, taken = np.array(free.indices), np.zeros(E, int)
    for choice in range(K):
        for token in range(T):
            expert = expected[token, choice]
            taken[expert] += 1
            if taken[expert] > capacity:
                expected[token, choice] = E
    np.testing.assert_array_equal(found.indices, expected)
    np.testing.assert_allclose(found.weights, np.where(expected == E, 0, free.weights), rtol=1e-6)
    np.testing.assert_array_equal(found.counts, np.minimum(taken, capacity))
    np.testing.assert_allclose(found.balance_loss, free.balance_loss, rtol=1e-6)
    gradient = jax.grad(lambda a: (top_k_routing(a, K, capacity=capacity, normalize=False).weights * WEIGHTS).sum())(jnp.asarray(LOGITS))
    plain = jax.grad(lambda a: (jnp.take_along_axis(jax.nn.softmax(a), free.indices, 1) * WEIGHTS * (expected != E)).sum())(jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-7)


def test_padding_goes_nowhere_and_is_never_touched():
    mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)

    def run(number):
        def value(a):
            found = top_k_routing(jnp.where(mask[:, None], a, number), K, mask=mask, capacity=2)
            return (found.weights * WEIGHTS).sum() + found.balance_loss + found.z_loss, found

        return jax.value_and_grad(value, has_aux=True)(jnp.asarray(LOGITS, jnp.float32))

    (value, found), gradient = run(jnp.nan)
    assert_trees_close(((value, found), gradient), run(0.0), rtol=1e-6)
    assert (found.indices[~mask] == E).all() and not found.weights[~mask].any() and not gradient[~mask].any()
    alone = top_k_routing(jnp.asarray(LOGITS, jnp.float32)[mask], K, capacity=2)
    assert_trees_close((alone.counts, alone.balance_loss, alone.z_loss), (found.counts, found.balance_loss, found.z_loss), rtol=1e-5)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_huge_logits_have_finite_weights_and_gradients(scores):
    logits = jnp.asarray(LOGITS * 1e4, jnp.float32)
    value = lambda a: (top_k_routing(a, K, scores=scores).weights * WEIGHTS).sum() + top_k_routing(a, K, scores=scores).balance_loss
    assert jnp.isfinite(value(logits)) and jnp.isfinite(jax.grad(value)(logits)).all()
    assert jnp.isfinite(jax.grad(lambda a: value(a - 1e5))(logits)).all()


def test_no_tokens_have_no_loss():
    found = top_k_routing(jnp.zeros((0, E)), K)
    assert found.indices.shape == (0, K) and found.balance_loss == 0 and found.z_loss == 0 and not found.counts.any()


def test_weights_are_float32_of_half_precision_logits_and_batch_axes_stay():
    found = top_k_routing(jnp.asarray(LOGITS, jnp.bfloat16).reshape(1, T, E), K, bias=jnp.asarray(BIAS))
    assert found.weights.dtype == jnp.float32 and found.indices.shape == (1, T, K)
    gradient = jax.grad(lambda b: top_k_routing(jnp.asarray(LOGITS), K, bias=b).weights[0, 0])(jnp.asarray(BIAS))
    assert not gradient.any()


WRONG = {
    "too many": (lambda: top_k_routing(jnp.zeros((2, 3)), 4), r"k is 4, but must be a whole number in \[1, 3\]"),
    "scores": (lambda: top_k_routing(jnp.zeros((2, 3)), 1, scores="tanh"), "scores is 'tanh', but must be one of 'softmax', 'sigmoid'"),
    "bias": (lambda: top_k_routing(jnp.zeros((2, 3)), 1, bias=jnp.zeros(2)), r"bias has shape \(2,\), but must be \(experts,\) = \(3,\)"),
    "mask": (lambda: top_k_routing(jnp.zeros((2, 3)), 1, mask=jnp.ones(3)), r"mask has shape \(3,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^top_k_routing: {message}"):
        call()
