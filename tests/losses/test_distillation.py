"""Values and gradients of the divergences and of DPO against plain code in float64, memory, edge cases, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.losses.linear_dpo import linear_dpo
from layers.losses.linear_jsd import linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence
from tests.losses import reference
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad, temp_bytes

BATCH, FEATURES, TEACHER_FEATURES, VOCAB = (3, 5), 4, 2, 7
MASK = jnp.array([[True] * 5, [True, False, True, True, False], [False] * 4 + [True]])


def draw(seed, *shape, dtype=jnp.float64):
    return draw_normal(seed, shape, dtype)


def arguments(batch=BATCH, dtype=jnp.float64):
    shapes = (*batch, FEATURES), (FEATURES, VOCAB), (VOCAB,), (*batch, TEACHER_FEATURES), (TEACHER_FEATURES, VOCAB), (VOCAB,)
    return [2 * draw(i, *s, dtype=dtype) for i, s in enumerate(shapes)]


def ours(x, kernel, bias, tx, tk, tb, *, mask=None, beta, **options):
    if beta is None:
        return linear_kl_divergence(x, kernel, tx, tk, bias, tb, mask, **options)
    return linear_jsd(x, kernel, tx, tk, bias, tb, mask, beta=beta, **options)


def plain(x, kernel, bias, tx, tk, tb, *, mask=None, beta, temperature=1.0, reduction="mean", block_size=None):
    loss = reference.jensen_shannon(x @ kernel + bias, jax.lax.stop_gradient(tx @ tk + tb), beta=beta or 0, temperature=temperature)
    mask = jnp.ones(loss.shape, bool) if mask is None else mask
    loss = jnp.where(mask, loss, 0)
    return {"mean": lambda: loss.sum() / mask.sum(), "sum": loss.sum, "none": lambda: loss}[reduction]()


def results(loss, args, **options):
    """The output, and the gradients of all arguments, from different gradients of each row."""

    def run(*args):
        y, pull = jax.vjp(partial(loss, **options), *args)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype) + 0.3).reshape(y.shape))

    return reference.jit_quickly(run)(*args)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": None},
        {"beta": None, "temperature": 0.5, "reduction": "none", "mask": MASK},
        {"beta": 0.2, "temperature": 2.0, "mask": MASK},
        {"beta": 0.2, "temperature": 2.0, "mask": MASK, "reduction": "none"},
        {"beta": 1, "reduction": "sum", "mask": MASK},
    ],
    ids=["kl", "kl none", "jsd", "jsd none", "reverse kl"],
)
def test_values_and_gradients_are_those_of_plain_code_in_float64(options):
    with jax.enable_x64(True):
        assert_trees_close(results(ours, arguments(), block_size=4, **options), results(plain, arguments(), **options), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_and_second_derivatives_are_those_of_plain_code(reduction):
    with jax.enable_x64(True):
        args = arguments()
        tangents = tuple(jnp.cos(3 * a) for a in args)

        def both(loss, **more):
            scalar = lambda *a: jnp.sin(3 * loss(*a, beta=0.3, mask=MASK, reduction=reduction, **more)).sum()
            return reference.jit_quickly(lambda *a: (jax.jvp(scalar, a, tangents)[1], jax.jvp(jax.grad(scalar, (0, 1, 2)), a, tangents)[1]))(*args)

        found, expected = both(ours, block_size=4), both(plain)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
        assert_trees_close(found[1], expected[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_neither_model_are_whole_in_memory(reduction):
    shapes = (2048, 256), (256, 16000), (2048, 512), (512, 16000)
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    loss = lambda fn: jit_value_and_grad(lambda *a: fn(*a).mean(), (0, 1))
    whole = lambda x, k, tx, tk: reference.jensen_shannon(x @ k, tx @ tk, beta=0.5)
    assert temp_bytes(loss(partial(linear_jsd, reduction=reduction)), *args) <= 0.12 * temp_bytes(loss(whole), *args)


def test_equal_models_have_no_divergence_and_no_gradient():
    x, kernel, bias, *_ = arguments(dtype=jnp.float32)
    for beta in (0, 0.5, 1):
        value, gradients = jit_value_and_grad(lambda x, k, b, beta=beta: linear_jsd(x, k, x, k, b, b, beta=beta), (0, 1, 2))(x, kernel, bias)
        assert_trees_close((value, gradients), jax.tree.map(jnp.zeros_like, (value, gradients)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [None, 0.5, 1])
@pytest.mark.parametrize("case", ["empty batch", "all masked"])
def test_nothing_that_counts_gives_zero_and_zero_gradients(case, beta):
    batch = (0,) if case == "empty batch" else (3,)
    found = results(ours, arguments(batch, jnp.float32), beta=beta, mask=jnp.zeros(batch, bool))
    for y in jax.tree.leaves(found):
        np.testing.assert_array_equal(y, jnp.zeros_like(y))


@pytest.mark.parametrize("beta", [None, 0.5])
def test_huge_logits_give_finite_losses_and_gradients(beta):
    x, kernel, bias, *teacher = arguments(dtype=jnp.float32)
    found = results(ours, (1e4 * x, kernel, bias, 1e4 * teacher[0], *teacher[1:]), beta=beta)
    assert all(jnp.isfinite(y).all() for y in jax.tree.leaves(found))


def test_jensen_shannon_is_at_most_the_entropy_of_its_mixture():
    x, kernel, bias, *teacher = arguments(dtype=jnp.float32)
    loss = ours(1e4 * x, kernel, bias, 1e4 * teacher[0], *teacher[1:], beta=0.5, reduction="none")
    assert (loss <= np.log(2) + 1e-6).all()


# DPO


def dpo_arguments():
    shapes = (
        (2, 5, FEATURES),
        (2, 3, FEATURES),
        (FEATURES, VOCAB),
        (VOCAB,),
        (2, 5, TEACHER_FEATURES),
        (2, 3, TEACHER_FEATURES),
        (TEACHER_FEATURES, VOCAB),
    )
    return [draw(i, *s) for i, s in enumerate(shapes)], jnp.array([[-100, 2, 3, 2, 1], [-100, -100, 0, 6, 6]]), jnp.array([[1, 2, -100], [5, 5, 0]])


def ours_dpo(cx, rx, kernel, bias, tcx, trx, tk, *, labels, **options):
    return linear_dpo(cx, rx, kernel, *labels, tcx, trx, tk, bias, beta=0.3, block_size=4, **options)


def plain_dpo(cx, rx, kernel, bias, tcx, trx, tk, *, labels, label_smoothing=0.0, reduction="mean", return_rewards=False):
    def log_probability(logits, labels):
        return -reference.cross_entropy(logits, labels, reduction="none").sum(-1)

    reference_logits = [jax.lax.stop_gradient(x @ tk) for x in (tcx, trx)]
    four = [log_probability(a, y) for a, y in zip((cx @ kernel + bias, rx @ kernel + bias, *reference_logits), labels * 2, strict=True)]
    loss = reference.dpo(*four, beta=0.3, label_smoothing=label_smoothing)
    loss = {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()
    return (loss, *(jax.lax.stop_gradient(0.3 * (four[i] - four[i + 2])) for i in (0, 1))) if return_rewards else loss


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}], ids=["mean", "none, smoothed"])
def test_dpo_and_its_gradients_are_those_of_plain_code_in_float64(options):
    with jax.enable_x64(True):
        args, *labels = dpo_arguments()
        found = [results(f, args, labels=tuple(labels), **options) for f in (ours_dpo, plain_dpo)]
        assert_trees_close(*found, rtol=1e-10, atol=1e-11)


def test_dpo_returns_rewards_as_constants():
    with jax.enable_x64(True):
        args, *labels = dpo_arguments()
        found = [f(*args, labels=tuple(labels), return_rewards=True, reduction="sum") for f in (ours_dpo, plain_dpo)]
        assert_trees_close(*found, rtol=1e-10)
        gradient = jit_grad(lambda x: sum(ours_dpo(x, *args[1:], labels=tuple(labels), return_rewards=True)[1]))(args[0])
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


# Errors


X, KERNEL, TX, TK = jnp.ones((3, 4)), jnp.ones((4, 7)), jnp.ones((3, 2)), jnp.ones((2, 7))
CHOSEN, LABELS = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
WRONG = {
    "another vocab": (lambda: linear_jsd(X, KERNEL, TX, TK[:, :5]), ValueError, "teacher's batch"),
    "another batch": (lambda: linear_kl_divergence(X, KERNEL, TX[:2], TK), ValueError, "linear_kl_divergence: the teacher's batch"),
    "teacher's features": (lambda: linear_jsd(X, KERNEL, X, TK), ValueError, "teacher_x has shape"),
    "beta above one": (lambda: linear_jsd(X, KERNEL, TX, TK, beta=1.5), ValueError, r"beta is 1.5, but must be a number in \[0, 1\]"),
    "temperature of zero": (lambda: linear_jsd(X, KERNEL, TX, TK, temperature=0), ValueError, "temperature is 0, but must be a number above 0"),
    "mask of numbers": (lambda: linear_jsd(X, KERNEL, TX, TK, mask=jnp.ones(3)), TypeError, "must be of bool"),
    "mask of another shape": (lambda: linear_jsd(X, KERNEL, TX, TK, mask=jnp.ones(2, bool)), ValueError, r"mask has shape \(2,\)"),
    "unknown reduction": (lambda: linear_kl_divergence(X, KERNEL, TX, TK, reduction="batchmean"), ValueError, "one of 'mean', 'sum', 'none'"),
    "dpo without time": (lambda: linear_dpo(X[0], X[0], KERNEL, LABELS, LABELS, TX, TX, TK), ValueError, r"chosen_x has shape \(4,\), but must be"),
    "dpo of unequal pairs": (
        lambda: linear_dpo(CHOSEN, CHOSEN[:1], KERNEL, LABELS, LABELS[:1], CHOSEN, CHOSEN[:1], KERNEL),
        ValueError,
        "one of each for a pair",
    ),
    "dpo beta of zero": (
        lambda: linear_dpo(CHOSEN, CHOSEN, KERNEL, LABELS, LABELS, CHOSEN, CHOSEN, KERNEL, beta=0),
        ValueError,
        "beta is 0, but must be a number above 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named_with_what_must_hold(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
