"""Weights of rows (`where`), and the entropy of each row, against plain code in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.linear_jsd import linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from tests.losses import reference
from tests.support import assert_trees_close, draw_normal, jit_grad, saved_bytes, temp_bytes

BATCH, FEATURES, VOCAB = (3, 4), 2, 5
LABELS = jnp.array([[0, 1, -100, 3], [4, 4, 2, 1], [-100, 0, 3, 2]])
MASKS = {
    "bool": jnp.array([[True, True, True, False], [False] * 4, [True, True, False, True]]),
    "integers": jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 2]]),
    "weights": jnp.array([[0.5, 2.0, 1.0, 0.0], [3.0, 0.1, 0.2, 0.3], [1.0, 0.0, 7.0, 0.5]]),
    "of each step": jnp.array([1.0, 0.0, 2.0, 0.5]),
    "of each sequence": jnp.array([[2.0], [0.0], [0.5]]),
}


def draw(seed, *shape, dtype=jnp.float64):
    return draw_normal(seed, shape, dtype)


def linear(x, kernel, bias, **options):
    return linear_cross_entropy(x, kernel, LABELS, bias, block_size=5, **options)


def softmax(x, kernel, bias, **options):
    return softmax_cross_entropy(x @ kernel + bias, LABELS, **options)


def jsd(x, kernel, bias, **options):
    return linear_jsd(x, kernel, x[..., ::-1] ** 2, kernel[::-1], bias, beta=0.3, **options)


def kl(x, kernel, bias, **options):
    return linear_kl_divergence(x, kernel, x[..., ::-1] ** 2, kernel[::-1], bias, **options)


LOSSES = {"linear": linear, "softmax": softmax, "jsd": jsd, "kl": kl}


def arguments():
    return draw(1, *BATCH, FEATURES), draw(2, FEATURES, VOCAB), draw(3, VOCAB)


def with_gradients(loss, args):
    def run(*args):
        y, pull = jax.vjp(loss, *args)
        return y, pull(jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), y))

    return reference.jit_quickly(run)(*args)


@pytest.mark.parametrize(("kind", "reduction"), [("weights", "mean"), ("bool", "sum"), ("of each sequence", "none")])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_count_by_their_weights(name, kind, reduction):
    with jax.enable_x64(True):
        weights = jnp.broadcast_to(MASKS[kind], BATCH).astype(jnp.float64)
        counted = weights * (LABELS != -100) if name in ("linear", "softmax") else weights

        def plain(*args):
            rows = LOSSES[name](*args, reduction="none") * weights
            return {"mean": lambda: rows.sum() / counted.sum(), "sum": rows.sum, "none": lambda: rows}[reduction]()

        ours = with_gradients(partial(LOSSES[name], where=MASKS[kind], reduction=reduction), arguments())
        assert_trees_close(ours, with_gradients(plain, arguments()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_weights_of_any_kind_are_those_of_each_row(kind):
    with jax.enable_x64(True):
        found = [softmax(*arguments(), where=w) for w in (MASKS[kind], jnp.broadcast_to(MASKS[kind], BATCH).astype(float))]
        np.testing.assert_allclose(*found, rtol=1e-12)


def test_mean_is_that_of_optax_over_what_counts():
    with jax.enable_x64(True):
        x, kernel, bias = arguments()
        labels = jnp.maximum(LABELS, 0)
        rows = optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias, labels)
        ours = linear_cross_entropy(x, kernel, labels, bias, where=MASKS["bool"])
        np.testing.assert_allclose(ours, rows.mean(where=MASKS["bool"]), rtol=1e-12)


@pytest.mark.parametrize("loss", [linear, softmax])
def test_weights_multiply_those_of_classes_and_the_accuracy(loss):
    with jax.enable_x64(True):
        args, classes, weights = arguments(), jnp.array([1.0, 0.5, 2.0, 0.0, 3.0]), MASKS["weights"].astype(jnp.float64)
        value, accuracy = loss(*args, where=weights, class_weights=classes, return_accuracy=True)
        rows, hits = loss(*args, reduction="none", class_weights=classes, return_accuracy=True)
        counted = weights * (LABELS != -100)
        np.testing.assert_allclose(value, (rows * weights).sum() / (counted * classes[jnp.maximum(LABELS, 0)]).sum(), rtol=1e-12)
        np.testing.assert_allclose(accuracy, (hits * weights).sum() / counted.sum(), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_are_constants_and_may_be_traced(name):
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda w: LOSSES[name](*arguments(), where=w)))(MASKS["weights"])
    np.testing.assert_array_equal(gradient, jnp.zeros(BATCH))


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_weights_are_named(name):
    x = jnp.ones((*BATCH, FEATURES)), jnp.ones((FEATURES, VOCAB)), jnp.ones(VOCAB)
    with pytest.raises(ValueError, match=r"where has shape \(3,\), but must broadcast to \(\*batch\) = \(3, 4\)"):
        LOSSES[name](*x, where=jnp.ones(3))
    with pytest.raises(TypeError, match="where is of dtype complex64"):
        LOSSES[name](*x, where=jnp.ones(BATCH, jnp.complex64))


# Entropy


def plain_entropy(logits, cap=None):
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(-1)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("loss", [linear, softmax])
def test_entropy_and_its_gradient_are_those_of_plain_code(loss, cap):
    with jax.enable_x64(True):
        args = arguments()
        ours = lambda *a: loss(*a, return_entropy=True, return_logsumexp=True, label_smoothing=0.1, logit_soft_cap=cap)

        def plain(x, kernel, bias):
            logits = x @ kernel + bias
            loss, lse = reference.cross_entropy(logits, LABELS, return_logsumexp=True, label_smoothing=0.1, logit_soft_cap=cap)
            return loss, lse, plain_entropy(logits, cap)

        assert_trees_close(with_gradients(ours, args), with_gradients(plain, args), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [linear, softmax])
def test_entropy_has_the_tangent_and_the_second_derivative_of_plain_code(loss):
    with jax.enable_x64(True):
        args = arguments()
        along = tuple(jnp.cos(3 * a) for a in args)

        def both(entropy):
            scalar = lambda *a: jnp.sin(entropy(*a)).sum()
            return reference.jit_quickly(lambda *a: (jax.jvp(scalar, a, along)[1], jax.jvp(jax.grad(scalar, (0, 1, 2)), a, along)[1]))(*args)

        ours = both(lambda *a: loss(*a, return_entropy=True)[1])
        assert_trees_close(ours, both(lambda x, k, b: plain_entropy(x @ k + b)), rtol=1e-9, atol=1e-10)


def test_entropy_of_certain_and_of_uniform_rows_is_exact_and_has_a_finite_gradient():
    logits = jnp.array([[0.0, -jnp.inf, -jnp.inf], [jnp.inf, 0.0, 1.0], [1e30, 0.0, -1e30], [0.0, 0.0, 0.0], [3.0, 3.0, -jnp.inf]])
    entropy = lambda a: softmax_cross_entropy(a, jnp.zeros(5, int), return_entropy=True, reduction="none")[1]
    np.testing.assert_allclose(entropy(logits), [0, 0, 0, np.log(3), np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(jit_grad(lambda a: entropy(a).sum())(logits), np.zeros((5, 3)), atol=1e-7)


def test_entropy_takes_one_number_a_row_and_never_the_logits():
    x, kernel, labels = jax.ShapeDtypeStruct((1024, 64), jnp.float32), jax.ShapeDtypeStruct((64, 8000), jnp.float32), jnp.zeros(1024, jnp.int32)

    def ours(x, kernel):
        loss, entropy = linear_cross_entropy(x, kernel, labels, return_entropy=True, block_size=128)
        return loss - 0.01 * entropy.mean()

    assert saved_bytes(ours, x, kernel) <= 4 * 4 * 1024 + 64
    assert temp_bytes(jax.value_and_grad(ours, (0, 1)), x, kernel) <= 0.4 * 4 * 1024 * 8000
