"""Cross entropy as people write it is found, with the product that makes the logits."""

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.rewrite.support import assert_same, assert_same_value, replaced

CASES = {}
keys = iter(jax.random.split(jax.random.key(0), 200))


def case(expected, *args):
    def add(fn):
        CASES[fn.__name__] = fn, expected, args
        return fn

    return add


def rnd(*shape, dtype=jnp.float32):
    return jax.random.normal(next(keys), shape).astype(dtype)


x, W, E = rnd(3, 7, 32), rnd(32, 50), rnd(50, 32)
labels = jax.random.randint(next(keys), (3, 7), 0, 50)
by_label = optax.softmax_cross_entropy_with_integer_labels


@case("linear_cross_entropy", x, W)
def label_wraps(x, W):
    return by_label(x @ W, labels - 50).mean()


@case("linear_cross_entropy", x, W)
def rows_cut(x, W):
    return by_label((x @ W)[:, :-1], labels[:, 1:]).mean()


@case("linear_cross_entropy", x.astype(jnp.bfloat16), W.astype(jnp.bfloat16))
def bf16(x, W):
    return by_label((x @ W).astype(jnp.float32), labels).mean()


@case("", x, W)
def classes_cut(x, W):
    return jax.nn.logsumexp((x @ W)[..., :40] - 1e-3 * (x @ W)[..., 10:], -1).sum()


@case("", x, W)
def other_axis(x, W):
    lp = jax.nn.log_softmax(x @ W, 1)
    return -jnp.take_along_axis(lp, labels[..., None], -1).mean()


@case("", x, W)
def label_twice(x, W):
    lp = jax.nn.log_softmax(x @ W)
    return -(jnp.take_along_axis(lp, labels[..., None], -1) + jnp.take_along_axis(lp, labels[..., None] // 2, -1)).mean()


@case("linear_cross_entropy", x, W)
def by_optax(x, W):
    return by_label(x @ W, labels).mean()


@case("linear_cross_entropy", x, E)
def tied(x, E):
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ E.T), labels[..., None], -1).sum()


@case("linear_cross_entropy", x, W)
def one_hot(x, W):
    return -(jax.nn.one_hot(labels, 50) * jax.nn.log_softmax(x @ W)).sum(-1).mean()


@case("linear_cross_entropy", x, W)
def one_hot_ignored(x, W):
    return -(jax.nn.one_hot(jnp.where(labels < 9, -1, labels), 50) * jax.nn.log_softmax(x @ W)).sum(-1).mean()


@case("linear_cross_entropy", x, W)
def masked_rows(x, W):
    return (by_label(x @ W, labels) * (labels > 3)).sum() / (labels > 3).sum()


@case("linear_cross_entropy", x, W, rnd(50))
def bias(x, W, b):
    return by_label(x @ W + b, labels).mean()


@case("linear_cross_entropy", x.reshape(-1, 32), W)
def arange(x, W):
    return -jax.nn.log_softmax(x @ W)[jnp.arange(21), labels.ravel()].mean()


@case("linear_cross_entropy", x, W)
def lse(x, W):
    z = x @ W
    return (jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[..., None], -1)[..., 0]).mean()


@case("linear_cross_entropy", x, W)
def capped(x, W):
    return by_label(jnp.tanh(x @ W / 5) * 5, labels).mean()


@case("softmax_cross_entropy", x, W)
def logits_kept(x, W):
    z = x @ W
    return by_label(z, labels).mean(), z


@case("", x, W)
def accuracy_too(x, W):
    lp = jax.nn.log_softmax(x @ W)
    return -jnp.take_along_axis(lp, labels[..., None], -1).mean(), lp.max()


@case("linear_cross_entropy", x, W)
def z_loss(x, W):
    z = x @ W
    lse = jax.nn.logsumexp(z, -1)
    return (lse - jnp.take_along_axis(z, labels[..., None], -1)[..., 0] + 1e-2 * lse**2).mean()


@case("", x, W)
def other_logits(x, W):
    z = x @ W
    return (jax.nn.logsumexp(z, -1) - jnp.take_along_axis(2 * z, labels[..., None], -1)[..., 0]).mean()


def smooth(labels):
    return optax.smooth_labels(jax.nn.one_hot(labels, 50), 0.1)


@case("linear_cross_entropy", x, W)
def smoothing(x, W):
    return optax.softmax_cross_entropy(x @ W, smooth(labels)).mean()


@case("linear_cross_entropy", x, W)
def smoothing_of_labels_that_are_no_class(x, W):
    return optax.softmax_cross_entropy(x @ W, smooth(labels - 20)).sum()


@case("linear_cross_entropy", x, W, jax.nn.softmax(rnd(3, 7, 50)))
def distributions(x, W, targets):
    return optax.softmax_cross_entropy(x @ W, targets).mean()


@case("linear_cross_entropy", x, W)
def one_hot_against_logits(x, W):
    z = x @ W
    return (jax.nn.logsumexp(z, -1) - (jax.nn.one_hot(labels - 5, 50) * z).sum(-1)).mean()


@case("linear_cross_entropy", x, W)
def under_an_outer_vmap(x, W):
    return jax.vmap(lambda x, y: by_label(x @ W, y).mean())(x, labels)


@case("linear_cross_entropy", x, W)
def selected_by_one_hot(x, W):
    hot = jnp.arange(50) == labels[..., None]
    return -jnp.where(hot, jax.nn.log_softmax(x @ W), 0).sum(-1).mean()


@case("softmax_cross_entropy", rnd(3, 7, 50))
def logits_given(z):
    return by_label(z, labels).mean()


@case("linear_cross_entropy", x[:1], W)
def one_row_of_tokens(x, W):
    return by_label(x @ W, labels[:1]).mean()


@case("linear_cross_entropy", x[:, :1], W)
def one_token_a_row(x, W):
    return by_label(x @ W, labels[:, :1]).mean()


@case("linear_cross_entropy", x[:1, None], W)
def one_row_beside_an_axis_of_length_1(x, W):
    log_p = jax.nn.log_softmax(x @ W)
    return -jnp.take_along_axis(log_p, labels[:1, None, :, None], -1).mean()


@case("", x, W)
def two_kinds_of_labels(x, W):
    z = x @ W
    return (by_label(z, labels) - jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None] // 2, -1)[..., 0]).mean()


@case("", x, W)
def entropy(x, W):
    log_p = jax.nn.log_softmax(x @ W)
    return -(jnp.exp(log_p) * log_p).sum(-1).mean()


@pytest.mark.parametrize("name", CASES)
def test_part_is_replaced_where_it_fits_and_nothing_changes(name, everything_pays):
    fn, expected, args = CASES[name]
    assert replaced(fn, *args, skip="elementwise") == expected.split()
    assert_same(fn, args) if expected else assert_same_value(fn, args)
