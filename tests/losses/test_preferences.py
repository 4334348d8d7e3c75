"""Losses of preferences against TRL's formulas written out in float64, on whole logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.losses.linear_dpo import linear_dpo
from tests.losses import reference
from tests.support import assert_trees_close, draw_normal, jit_value_and_grad, temp_bytes

PAIRS, FEATURES, VOCAB = 4, 3, 6
CHOSEN_LABELS = jnp.array([[-100, 2, 3, 2, 1], [-100, -100, 0, 5, 5], [1, 1, 0, -100, -100], [4, 2, 2, 0, 3]])
REJECTED_LABELS = jnp.array([[1, 2, -100], [5, 5, 0], [0, 3, 3], [-100, 1, 4]])
TOKEN_WEIGHTS = jnp.array([1, 0, 2, 1, 1]), jnp.array([[1, 1, 0], [2, 1, 1], [1, 0, 0], [1, 3, 1]])
PAIR_WEIGHTS = jnp.array([1, 0, 2, 3])


def arrays():
    shapes = (PAIRS, 5, FEATURES), (PAIRS, 3, FEATURES), (FEATURES, VOCAB), (VOCAB,), (PAIRS, 5, 2), (PAIRS, 3, 2), (2, VOCAB)
    return [draw_normal(i, s, jnp.float64) for i, s in enumerate(shapes)]


def sequence_log_prob(logits, labels, weights, average):
    weights = jnp.broadcast_to(weights, labels.shape) * (labels != -100)
    of_tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0] * weights
    return of_tokens.sum(-1) / (weights.sum(-1) if average else 1), of_tokens, weights


def trl(loss_type, chosen, rejected, of_reference, *, beta, label_smoothing, gamma):
    """`DPOTrainer.dpo_loss` and `CPOTrainer.cpo_loss`."""
    logits = (chosen - rejected) - (of_reference[0] - of_reference[1])
    log_sigmoid = lambda x: -jnp.logaddexp(0.0, -x)
    if loss_type == "simpo":
        logits = logits - gamma / beta
    if loss_type in ("sigmoid", "simpo", "cpo"):
        return -log_sigmoid(beta * logits) * (1 - label_smoothing) - log_sigmoid(-beta * logits) * label_smoothing
    if loss_type == "robust":
        return (-log_sigmoid(beta * logits) * (1 - label_smoothing) + log_sigmoid(-beta * logits) * label_smoothing) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return jnp.maximum(1 - beta * logits, 0)
    return (logits - 1 / (2 * beta)) ** 2


def plain(cx, rx, kernel, bias, tcx, trx, tk, *, loss_type, beta=0.3, label_smoothing=0.0, gamma=0.5, alpha=0.0, average, tokens=(1, 1), pairs=None):
    four = [
        sequence_log_prob(x @ k + b, y, w, average)
        for x, k, b, y, w in (
            (cx, kernel, bias, CHOSEN_LABELS, tokens[0]),
            (rx, kernel, bias, REJECTED_LABELS, tokens[1]),
            (tcx, tk, 0, CHOSEN_LABELS, tokens[0]),
            (trx, tk, 0, REJECTED_LABELS, tokens[1]),
        )
    ]
    of_reference = (0, 0) if loss_type in ("simpo", "cpo") else jax.lax.stop_gradient((four[2][0], four[3][0]))
    losses = trl(loss_type, four[0][0], four[1][0], of_reference, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    weights = jnp.ones(PAIRS) if pairs is None else pairs
    nll = -(four[0][1] * weights[:, None]).sum() / (four[0][2] * (weights != 0)[:, None]).sum() if alpha else 0
    return (losses * weights).sum() / weights.sum() + alpha * nll


def ours(cx, rx, kernel, bias, tcx, trx, tk, *, loss_type, beta=0.3, gamma=0.5, alpha=None, average=None, tokens=(None, None), pairs=None, **options):
    model = (None,) * 3 if loss_type in ("simpo", "cpo") else (tcx, trx, tk)
    return linear_dpo(
        cx,
        rx,
        kernel,
        CHOSEN_LABELS,
        REJECTED_LABELS,
        *model,
        bias,
        loss_type=loss_type,
        beta=beta,
        simpo_gamma=gamma,
        cpo_alpha=alpha,
        average_log_prob=average,
        chosen_where=tokens[0],
        rejected_where=tokens[1],
        where=pairs,
        block_size=7,
        **options,
    )


CASES = {
    "sigmoid": ({"loss_type": "sigmoid", "label_smoothing": 0.1}, {"average": False}),
    "sigmoid of averages": ({"loss_type": "sigmoid", "average": True}, {}),
    "ipo": ({"loss_type": "ipo"}, {"average": True}),
    "ipo of sums": ({"loss_type": "ipo", "average": False}, {}),
    "hinge": ({"loss_type": "hinge"}, {"average": False}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.2}, {"average": False}),
    "simpo": ({"loss_type": "simpo", "beta": 2.0, "gamma": 1.0}, {"average": True}),
    "simpo with cross entropy": ({"loss_type": "simpo", "alpha": 0.7}, {"average": True}),
    "cpo": ({"loss_type": "cpo"}, {"average": False, "alpha": 1.0}),
    "cpo without cross entropy": ({"loss_type": "cpo", "alpha": 0.0, "label_smoothing": 0.1}, {"average": False}),
    "weights of tokens": ({"loss_type": "ipo", "tokens": TOKEN_WEIGHTS}, {"average": True}),
    "weights of pairs": ({"loss_type": "sigmoid", "pairs": PAIR_WEIGHTS, "tokens": TOKEN_WEIGHTS}, {"average": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_trl(name):
    options, filled_in = CASES[name]
    with jax.enable_x64(True):
        args = arrays()
        run = lambda f, **o: reference.jit_quickly(jit_value_and_grad(partial(f, **o), tuple(range(7))))(*args)
        assert_trees_close(run(ours, **options), run(plain, **options, **filled_in), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_log_probabilities_of_the_reference_may_be_computed_before(loss_type):
    with jax.enable_x64(True):
        cx, rx, kernel, bias, tcx, trx, tk = arrays()
        average = loss_type == "ipo"
        before = [sequence_log_prob(x @ tk, y, 1, average)[0] for x, y in ((tcx, CHOSEN_LABELS), (trx, REJECTED_LABELS))]

        def given(cx, before):
            log_probs = dict(zip(("reference_chosen_log_probs", "reference_rejected_log_probs"), before, strict=True))
            return linear_dpo(cx, rx, kernel, CHOSEN_LABELS, REJECTED_LABELS, bias=bias, loss_type=loss_type, beta=0.3, **log_probs)

        found = jit_value_and_grad(given, (0, 1))(cx, before)
        expected = jit_value_and_grad(lambda x: ours(x, *arrays()[1:], loss_type=loss_type))(cx)
        assert_trees_close((found[0], found[1][0]), expected, rtol=1e-10, atol=1e-12)
        assert not any(g.any() for g in found[1][1])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_of_cpo_agree_with_its_mean(reduction):
    with jax.enable_x64(True):
        found = ours(*arrays(), loss_type="cpo", reduction=reduction)
        np.testing.assert_allclose(found.sum() / PAIRS, ours(*arrays(), loss_type="cpo"), rtol=1e-12)


def test_pair_and_tokens_that_do_not_count_may_be_nan():
    weights = jnp.array([1, 1, 0, 2])
    kept = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1]])

    def loss(cx, rx, number):
        _, _, kernel, bias, tcx, trx, tk = (a.astype(jnp.float32) for a in ARGS)
        rx = jnp.where((kept * weights[:, None])[..., None] == 0, number, rx)
        trx = jnp.where((kept * weights[:, None])[..., None] == 0, number, trx)
        cx = jnp.where(((CHOSEN_LABELS == -100) | (weights[:, None] == 0))[..., None], number, cx)
        return ours(cx, rx, kernel, bias, tcx, trx, tk, loss_type="sigmoid", tokens=(None, kept), pairs=weights)

    with jax.enable_x64(True):
        ARGS = arrays()
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    args = [a.astype(jnp.float32) for a in ARGS[:2]]
    given, expected = run(*args, jnp.nan), run(*args, 0.0)
    assert_trees_close(given, expected, rtol=1e-6)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(given))


def test_logits_of_no_model_are_whole_in_memory():
    shapes = (4, 256, 64), (64, 8000), (4, 256, 64), (64, 8000)
    labels = jnp.zeros((4, 256), jnp.int32)
    loss = lambda x, k, tx, tk: linear_dpo(x, x, k, labels, labels, tx, tx, tk, loss_type="ipo", block_size=128)
    taken = temp_bytes(jax.grad(loss, (0, 1)), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert taken <= 0.4 * 4 * 1024 * 8000


X, KERNEL, LABELS = jnp.ones((2, 3, 4)), jnp.ones((4, 7)), jnp.zeros((2, 3), jnp.int32)
ARGUMENTS = (X, X, KERNEL, LABELS, LABELS)
WRONG = {
    "no reference": (lambda: linear_dpo(*ARGUMENTS), "needs a reference: give reference_chosen_x"),
    "half of a reference": (lambda: linear_dpo(*ARGUMENTS, X, X), "needs a reference"),
    "half of what was computed": (lambda: linear_dpo(*ARGUMENTS, reference_chosen_log_probs=jnp.zeros(2)), "together"),
    "both": (
        lambda: linear_dpo(*ARGUMENTS, X, X, KERNEL, reference_chosen_log_probs=jnp.zeros(2), reference_rejected_log_probs=jnp.zeros(2)),
        "and no reference model",
    ),
    "a reference for cpo": (lambda: linear_dpo(*ARGUMENTS, X, X, KERNEL, loss_type="cpo"), "has no reference"),
    "unknown loss": (lambda: linear_dpo(*ARGUMENTS, X, X, KERNEL, loss_type="dpo"), "loss_type is 'dpo', but must be one of 'sigmoid'"),
    "smoothed hinge": (lambda: linear_dpo(*ARGUMENTS, X, X, KERNEL, loss_type="hinge", label_smoothing=0.1), "label_smoothing is 0.1, but must be 0"),
    "smoothing of a half": (lambda: linear_dpo(*ARGUMENTS, X, X, KERNEL, label_smoothing=0.5), "label_smoothing is 0.5"),
    "another time": (lambda: linear_dpo(*ARGUMENTS, X[:, :2], X, KERNEL), "reference_chosen_x has shape"),
    "labels of another shape": (lambda: linear_dpo(X, X, KERNEL, LABELS[:1], LABELS, X, X, KERNEL), "chosen_labels has shape"),
    "kernel of other features": (lambda: linear_dpo(X, X[..., :3], KERNEL, LABELS, LABELS, X, X, KERNEL), "rejected_x has shape"),
    "weights of another shape": (lambda: linear_dpo(*ARGUMENTS, X, X, KERNEL, chosen_where=jnp.ones(2)), "chosen_where has shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named_as_that_of_linear_dpo(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^linear_dpo: .*{message}"):
        call()
