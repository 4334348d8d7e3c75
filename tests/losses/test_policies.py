"""Losses of policies, from the head of a model, against TRL's formulas written out in float64 on whole logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.losses.linear_grpo import linear_grpo
from layers.losses.linear_kto import linear_kto
from layers.losses.linear_log_prob import linear_log_prob
from layers.losses.linear_orpo import linear_orpo
from layers.losses.linear_ppo import linear_ppo
from tests.losses import reference
from tests.support import assert_trees_close, temp_bytes

B, T, D, V = 3, 4, 3, 6
IDS = np.array([[1, 0, 5, 2], [3, 3, -100, -100], [-100, 4, 1, -100]])
COUNTS = np.array([[1.0, 2.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.5, 1.0]])
ADVANTAGES = np.array([1.3, -0.7, 0.0])
rng = np.random.default_rng(0)
X, OLD_X, REFERENCE_X = (rng.normal(size=(B, T, D)) for _ in range(3))
KERNEL, BIAS = rng.normal(size=(D, V)), rng.normal(size=V)
TOKEN_ADVANTAGES = rng.normal(size=(B, T))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def token_log_probs(x, kernel, bias, ids=IDS, temperature=1.0):
    log_p = jax.nn.log_softmax((x @ kernel + bias) / temperature)
    return jnp.take_along_axis(log_p, jnp.maximum(ids, 0)[..., None], -1)[..., 0]


def before(x, **options):
    return np.asarray(token_log_probs(x, KERNEL, 0, **options))


OLD, REFERENCE = (np.asarray(jax.nn.log_softmax(x @ KERNEL)[..., 0]) for x in (OLD_X, REFERENCE_X))


def trl_grpo(x, kernel, bias, *, loss_type, old=None, ref=None, advantages=ADVANTAGES, beta=0.0, low=0.2, high=0.2, delta=None,
             sequence=False, temperature=1.0, counts=1.0, length=T, items=None):  # fmt: skip
    """`GRPOTrainer._compute_loss`."""
    mask = jnp.where(IDS == -100, 0, jnp.broadcast_to(counts, IDS.shape))
    log_p = token_log_probs(x, kernel, bias, temperature=temperature)
    log_ratio = log_p - (jax.lax.stop_gradient(log_p) if old is None else old)
    if sequence:
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None]
    ratio = jnp.exp(log_ratio)
    a = advantages[:, None] if advantages.ndim == 1 else advantages
    if loss_type == "cispo":
        losses = -jax.lax.stop_gradient(jnp.minimum(ratio, high)) * a * log_p
    else:
        clipped = jnp.clip(ratio, 1 - low, 1 + high)
        ratio = ratio if delta is None else jnp.minimum(ratio, delta)
        losses = -jnp.minimum(ratio * a, clipped * a)
    if beta:
        losses = losses + beta * (jnp.exp(ref - log_p) - (ref - log_p) - 1)
    if loss_type in ("grpo", "gspo"):
        return ((losses * mask).sum(-1) / mask.sum(-1)).mean()
    if loss_type == "dr_grpo":
        return (losses * mask).sum() / (B * length)
    return (losses * mask).sum() / (mask.sum() if items is None else items)


def ours_grpo(x, kernel, bias, *, old=None, ref=None, advantages=ADVANTAGES, low=0.2, high=None, sequence=None, counts=None, length=None,
              items=None, **options):  # fmt: skip
    return linear_grpo(
        x, kernel, IDS, advantages, bias, old_log_probs=old, reference_log_probs=ref, epsilon=low, epsilon_high=high, num_items=items,
        importance_sampling_level={None: None, True: "sequence", False: "token"}[sequence], max_completion_length=length, where=counts,
        block_size=5, **options,
    )  # fmt: skip


CASES = {
    "grpo": ({"loss_type": "grpo", "old": OLD, "ref": REFERENCE, "beta": 0.3}, {}),
    "grpo on policy": ({"loss_type": "grpo"}, {}),
    "bnpo, token advantages": ({"loss_type": "bnpo", "old": OLD, "advantages": TOKEN_ADVANTAGES, "delta": 1.5}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "old": OLD, "length": 9, "high": 0.3}, {}),
    "dr_grpo of time": ({"loss_type": "dr_grpo", "old": OLD}, {}),
    "dapo, weights": ({"loss_type": "dapo", "old": OLD, "high": 0.28, "counts": COUNTS}, {}),
    "dapo, items, temperature": ({"loss_type": "dapo", "old": OLD, "items": 17.0, "temperature": 0.7, "ref": REFERENCE, "beta": 0.1}, {}),
    "cispo": ({"loss_type": "cispo", "old": OLD, "high": 1.2, "ref": REFERENCE, "beta": 0.1}, {}),
    "gspo": ({"loss_type": "gspo", "old": OLD, "low": 0.1}, {"sequence": True}),
    "sequence level of bnpo": ({"loss_type": "bnpo", "old": OLD, "sequence": True, "counts": COUNTS}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_grpo_and_its_gradients_are_those_of_trl(name):
    options, filled_in = CASES[name]
    plain = options | filled_in
    if "low" in plain and "high" not in plain:
        plain["high"] = plain["low"]
    run = lambda f, **o: reference.jit_quickly(jax.value_and_grad(partial(f, **o), (0, 1, 2)))(X, KERNEL, BIAS)
    assert_trees_close(run(ours_grpo, **options), run(trl_grpo, **plain), rtol=1e-10, atol=1e-12)


def test_heads_of_old_and_reference_give_what_their_log_probabilities_do():
    old, ref = before(OLD_X), before(REFERENCE_X)
    loss = lambda x, ox, rx: linear_grpo(
        x, KERNEL, IDS, ADVANTAGES, old_x=ox, old_kernel=KERNEL, reference_x=rx, reference_kernel=KERNEL, beta=0.2, loss_type="grpo"
    )
    found = jax.value_and_grad(loss, (0, 1, 2))(X, OLD_X, REFERENCE_X)
    expected = jax.value_and_grad(lambda x: trl_grpo(x, KERNEL, 0, loss_type="grpo", old=old, ref=ref, beta=0.2))(X)
    assert_trees_close((found[0], found[1][0]), expected, rtol=1e-10, atol=1e-12)
    assert not found[1][1].any() and not found[1][2].any()


def test_metrics_are_means_over_the_tokens_that_count():
    loss = partial(linear_grpo, X, KERNEL, IDS, ADVANTAGES, old_log_probs=OLD, reference_log_probs=REFERENCE)
    _, metrics = loss(return_metrics=True)
    log_p, kept = token_log_probs(X, KERNEL, 0), IDS != -100
    ratio, d, p = jnp.exp(log_p - OLD), REFERENCE - log_p, jax.nn.softmax(X @ KERNEL)
    mean = lambda y: y[kept].mean()
    a = np.broadcast_to(ADVANTAGES[:, None], IDS.shape)
    expected = (jnp.exp(d) - d - 1, -(p * jnp.log(p)).sum(-1), ratio, (ratio < 0.8) & (a < 0), (ratio > 1.2) & (a > 0))
    np.testing.assert_allclose(jnp.stack(metrics), jnp.stack([mean(y) for y in expected]), rtol=1e-10)
    assert isinstance(metrics, layers.PolicyMetrics)
    assert not jax.grad(lambda x: linear_grpo(x, KERNEL, IDS, ADVANTAGES, return_metrics=True)[1].entropy)(X).any()


def test_ratio_that_overflows_harms_no_token_that_is_clipped_or_has_no_advantage():
    far = np.where(IDS == -100, 0.0, -900.0)  # the ratio is exp(900 - ...)
    loss = lambda x, a: linear_grpo(x, KERNEL, IDS, a, old_log_probs=far, loss_type="bnpo")
    for advantages in (np.array([1.0, 2.0, 0.0]), np.zeros(3)):
        value, gradient = jax.value_and_grad(loss)(X, advantages)
        np.testing.assert_allclose(value, -1.2 * (advantages * (IDS != -100).sum(-1)).sum() / (IDS != -100).sum(), rtol=1e-12)
        assert not gradient.any()
    value, gradient = jax.value_and_grad(partial(linear_grpo, delta=4.0), argnums=0)(X, KERNEL, IDS, -np.ones(3), old_log_probs=far)
    assert value == pytest.approx(4.0) and not gradient.any()


@pytest.mark.parametrize("loss", [partial(linear_grpo, loss_type="gspo"), linear_ppo])
def test_tokens_that_do_not_count_may_be_nan(loss):
    hidden = IDS == -100

    def run(number):
        x, old = jnp.where(hidden[..., None], number, X), jnp.where(hidden, number, OLD)
        return jax.value_and_grad(loss)(x, KERNEL, IDS, jnp.where(hidden, number, TOKEN_ADVANTAGES), old_log_probs=old)

    assert_trees_close(run(jnp.nan), run(0.0), rtol=1e-12)


def test_completion_without_tokens_has_no_loss():
    ids = np.where(np.arange(B)[:, None] == 1, -100, IDS)
    value, gradient = jax.value_and_grad(partial(linear_grpo, loss_type="grpo"))(X, KERNEL, ids, ADVANTAGES)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and not gradient[1].any()
    assert linear_grpo(X, KERNEL, np.full_like(IDS, -100), ADVANTAGES) == 0


def test_token_beyond_the_vocabulary_gives_nan():
    assert jnp.isnan(linear_grpo(X, KERNEL, np.where(IDS == 5, V, IDS), ADVANTAGES))


def trl_ppo(x, kernel, bias, *, old, advantages, c, low=0.2, high=0.2):
    mask, log_p = IDS != -100, token_log_probs(x, kernel, bias)
    ratio, log_all = jnp.exp(log_p - old), jax.nn.log_softmax(x @ kernel + bias)
    losses = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - low, 1 + high))
    entropy = -(jnp.exp(log_all) * log_all).sum(-1)
    return ((losses - c * entropy) * mask).sum() / mask.sum()


def test_ppo_and_its_gradients_are_those_of_the_formula():
    ours = lambda x, k, b: linear_ppo(x, k, IDS, TOKEN_ADVANTAGES, b, old_log_probs=OLD, epsilon_high=0.3, entropy_coefficient=0.05, block_size=5)
    plain = partial(trl_ppo, old=OLD, advantages=TOKEN_ADVANTAGES, c=0.05, high=0.3)
    run = lambda f: jax.value_and_grad(f, (0, 1, 2))(X, KERNEL, BIAS)
    assert_trees_close(run(ours), run(plain), rtol=1e-10, atol=1e-12)


OTHER_IDS = np.array([[2, 2, 1], [0, -100, -100], [5, 1, 4]])
OTHER_X = rng.normal(size=(B, 3, D))


def trl_orpo(cx, rx, kernel, bias, *, beta, weights):
    kept = IDS != -100, OTHER_IDS != -100
    both = [token_log_probs(x, kernel, bias, ids) * k for x, ids, k in zip((cx, rx), (IDS, OTHER_IDS), kept, strict=True)]
    chosen, rejected = (y.sum(-1) / k.sum(-1) for y, k in zip(both, kept, strict=True))
    log_odds = (chosen - rejected) - (jnp.log1p(-jnp.exp(chosen)) - jnp.log1p(-jnp.exp(rejected)))
    nll = -(both[0] * (weights != 0)[:, None]).sum() / (kept[0] * (weights != 0)[:, None]).sum()
    return nll - (weights * beta * jax.nn.log_sigmoid(log_odds)).sum() / weights.sum()


@pytest.mark.parametrize("weights", [np.ones(B), np.array([1.0, 0.0, 2.0])])
def test_orpo_and_its_gradients_are_those_of_trl(weights):
    where = None if weights.all() and weights.std() == 0 else weights
    ours = lambda cx, rx, k, b: linear_orpo(cx, rx, k, IDS, OTHER_IDS, b, beta=0.4, where=where, block_size=5)
    run = lambda f: jax.value_and_grad(f, (0, 1, 2, 3))(X, OTHER_X, KERNEL, BIAS)
    assert_trees_close(run(ours), run(partial(trl_orpo, beta=0.4, weights=weights)), rtol=1e-10, atol=1e-12)


def test_orpo_of_a_certain_sequence_is_finite():
    sure = 1e3 * jax.nn.one_hot(jnp.array([[1, 2]]), V)
    loss = lambda x: linear_orpo(x, -x, jnp.eye(V), np.array([[1, 2]]), np.array([[1, 2]]))
    assert all(jnp.isfinite(y).all() for y in jax.value_and_grad(loss)(sure))


def trl_kto(x, kernel, bias, *, loss_type, ref, kl, liked, beta, weights=(1.0, 1.0)):
    h = (token_log_probs(x, kernel, bias) * (IDS != -100)).sum(-1) - ref
    z, s = max(kl, 0), jax.nn.sigmoid
    if loss_type == "kto":
        chosen, rejected = 1 - s(beta * (h - z)), 1 - s(beta * (z - h))
    else:
        chosen, rejected = 1 - s(beta * h), s(beta * h)
    return jnp.where(liked, weights[0] * chosen, weights[1] * rejected).mean()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [0.0, 0.4, -2.0])
def test_kto_and_its_gradients_are_those_of_trl(loss_type, kl):
    liked = np.array([True, False, True])
    ref = (before(REFERENCE_X) * (IDS != -100)).sum(-1)
    options = {"loss_type": loss_type, "beta": 0.3, "kl": kl}
    computed = lambda x, k, b: linear_kto(
        x, k, IDS, liked, REFERENCE_X, KERNEL, b, **options, desirable_weight=1.5, undesirable_weight=0.5, block_size=5
    )
    given = lambda x, k, b: linear_kto(
        x, k, IDS, liked, bias=b, reference_log_probs=ref, **options, desirable_weight=1.5, undesirable_weight=0.5, block_size=5
    )
    run = lambda f: jax.value_and_grad(f, (0, 1, 2))(X, KERNEL, BIAS)
    expected = run(partial(trl_kto, ref=ref, liked=liked, weights=(1.5, 0.5), **options))
    assert_trees_close(run(computed), expected, rtol=1e-10, atol=1e-12)
    assert_trees_close(run(given), expected, rtol=1e-10, atol=1e-12)


def test_kto_of_sequences_that_do_not_count_may_be_nan():
    where = np.array([1.0, 0.0, 2.0])

    def run(number):
        x, rx = (jnp.where(where[:, None, None] == 0, number, y) for y in (X, REFERENCE_X))
        return jax.value_and_grad(lambda x: linear_kto(x, KERNEL, IDS, np.array([True, False, False]), rx, KERNEL, where=where))(x)

    assert_trees_close(run(jnp.nan), run(0.0), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"logit_soft_cap": 2.0, "temperature": 1.4}], ids=str)
def test_log_probability_entropy_logsumexp_and_rank_are_those_of_whole_logits(options):
    weights = rng.normal(size=(3, B, T)) * (IDS != -100)

    def plain(x, kernel, bias):
        a = x @ kernel + bias
        if "logit_soft_cap" in options:
            a = options["logit_soft_cap"] * jnp.tanh(a / options["logit_soft_cap"])
        a = a / options.get("temperature", 1.0)
        log_p = jax.nn.log_softmax(a)
        own = jnp.take_along_axis(log_p, jnp.maximum(IDS, 0)[..., None], -1)
        found = own[..., 0], jax.nn.logsumexp(a, -1), -(jnp.exp(log_p) * log_p).sum(-1)
        return sum((w * y).sum() for w, y in zip(weights, found, strict=True)), jnp.where(IDS == -100, -1, (log_p > own).sum(-1))

    def ours(x, kernel, bias):
        returned = {"return_logsumexp": True, "return_entropy": True, "return_rank": True}
        *found, rank = linear_log_prob(x, kernel, IDS, bias, block_size=5, **returned, **options)
        return sum((w * y).sum() for w, y in zip(weights, found, strict=True)), rank

    run = lambda f: jax.value_and_grad(f, (0, 1, 2), has_aux=True)(X, KERNEL, BIAS)
    assert_trees_close(run(ours), run(plain), rtol=1e-10, atol=1e-12)
    tangents = X[::-1], KERNEL[::-1], BIAS[::-1]
    slope = lambda f: jax.jvp(lambda *a: f(*a)[0], (X, KERNEL, BIAS), tangents)[1]
    np.testing.assert_allclose(slope(ours), slope(plain), rtol=1e-10)


@pytest.mark.parametrize("loss", [linear_grpo, partial(linear_grpo, loss_type="gspo"), linear_ppo])
def test_policy_losses_never_hold_the_logits_whole(loss):
    shapes = (4, 256, 64), (64, 8000), (4, 256), (4,), (4, 256)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32
    args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    gradient = jax.grad(lambda x, k, ids, a, old: loss(x, k, ids, a, old_log_probs=old, block_size=128), (0, 1))
    assert temp_bytes(gradient, *args) <= 0.4 * 4 * 1024 * 8000


WRONG = {
    "divergence without a reference": (
        lambda: linear_grpo(X, KERNEL, IDS, ADVANTAGES, beta=0.1),
        "linear_grpo: beta is 0.1, which needs a reference",
    ),
    "half of a head": (lambda: linear_grpo(X, KERNEL, IDS, ADVANTAGES, old_x=X), "linear_grpo: old_x is given without the rest"),
    "both": (
        lambda: linear_ppo(X, KERNEL, IDS, ADVANTAGES, old_x=X, old_kernel=KERNEL, old_log_probs=OLD),
        "old_log_probs is given, and so is old_x",
    ),
    "advantages of time": (lambda: linear_grpo(X, KERNEL, IDS, np.ones(T)), r"advantages has shape \(4,\), but must be \(\*batch\) or"),
    "cispo without a bound": (lambda: linear_grpo(X, KERNEL, IDS, ADVANTAGES, loss_type="cispo"), "needs the largest ratio"),
    "small delta": (lambda: linear_ppo(X, KERNEL, IDS, ADVANTAGES, delta=1.1), "linear_ppo: delta is 1.1, but must be above"),
    "unknown loss": (lambda: linear_grpo(X, KERNEL, IDS, ADVANTAGES, loss_type="ppo"), "loss_type is 'ppo', but must be one of 'grpo'"),
    "old of another time": (lambda: linear_grpo(X, KERNEL, IDS, ADVANTAGES, old_log_probs=OLD[:, :2]), r"old_log_probs has shape \(3, 2\)"),
    "no reference": (lambda: linear_kto(X, KERNEL, IDS, np.ones(B, bool)), "linear_kto: reference_x is None"),
    "reference of tokens": (lambda: linear_kto(X, KERNEL, IDS, np.ones(B, bool), reference_log_probs=OLD), "reference_log_probs has shape"),
    "one sequence": (lambda: linear_orpo(X, OTHER_X[:1], KERNEL, IDS, OTHER_IDS[:1]), "linear_orpo: chosen sequences have batch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
