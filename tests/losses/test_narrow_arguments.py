"""Arguments that a loss could silently misread: narrow labels, masked rows that are not finite, options that are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.linear_dpo import linear_dpo
from layers.losses.linear_jsd import linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from tests.support import draw_normal, jit_grad, jit_value_and_grad


def normal(*shape, seed=0):
    return draw_normal(seed, shape)


@pytest.mark.parametrize(("dtype", "labels"), [(np.int8, [1, 100, 0, 7]), (np.uint8, [156, 255, 0, 7]), (np.int16, [1, 299, -100, 7])])
def test_labels_of_a_narrow_dtype_mean_what_wide_ones_do(dtype, labels):
    a, x, kernel = normal(4, 300), normal(4, 3, seed=1), normal(3, 300, seed=2)
    narrow, wide = np.array(labels, dtype), np.array(labels, np.int32)
    for loss, args in ((softmax_cross_entropy, (a,)), (lambda x, k, y: linear_cross_entropy(x, k, y), (x, kernel))):
        given, expected = (jit_value_and_grad(lambda *a, y=y, loss=loss: loss(*a, y), tuple(range(len(args))))(*args) for y in (narrow, wide))
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-6), given, expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_row_of_the_teacher_may_be_nan(beta, reduction):
    x, k, tx, tk, mask = normal(3, 2), normal(2, 5, seed=1), normal(3, 4, seed=2), normal(4, 5, seed=3), jnp.array([False, True, True])
    loss = lambda x, k, tx: linear_jsd(x, k, tx, tk, None, None, mask, beta=beta, reduction=reduction).sum()
    given = jit_grad(loss, (0, 1))(x, k, tx.at[0].set(jnp.nan))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-6, atol=1e-7), given, jit_grad(loss, (0, 1))(x, k, tx))


def test_class_that_the_teacher_excludes_gives_finite_gradients():
    x, k, tx, tk = normal(3, 2), normal(2, 5, seed=1), normal(3, 4, seed=2), normal(4, 5, seed=3)
    bias = jnp.zeros(5).at[4].set(-jnp.inf)
    loss, grads = jit_value_and_grad(lambda x, k: linear_jsd(x, k, tx, tk, None, bias, beta=1.0), (0, 1))(x, k)
    assert loss > 1e30
    assert all(np.isfinite(g).all() for g in (loss, *grads))


def test_a_traced_option_is_an_error_that_says_so():
    a, y, x, k = normal(2, 3), jnp.array([0, 2]), normal(2, 4), normal(4, 3)
    with pytest.raises(TypeError, match="ignore_index is traced"):
        jax.jit(lambda i: softmax_cross_entropy(a, y, ignore_index=i))(1)
    with pytest.raises(TypeError, match="block_size is traced"):
        jax.jit(lambda n: linear_kl_divergence(x, k, x, k, block_size=n))(1)


def test_wrong_types_are_errors():
    a, y = normal(2, 3), jnp.array([0, 2])
    with pytest.raises(TypeError, match="ignore_index"):
        softmax_cross_entropy(a, y, ignore_index=None)
    with pytest.raises(TypeError, match="class_weights"):
        softmax_cross_entropy(a, y, class_weights=np.array([1j, 2, 3]))
    x, k, tokens = normal(1, 2, 4), normal(4, 3), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="both need the same vocab"):
        linear_dpo(x, x, k, tokens, tokens, x, x, normal(4, 7))
