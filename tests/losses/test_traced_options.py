"""Numbers that only arithmetic needs may be traced: the losses are the same, and no such number has a gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import layers
from tests.losses.good_calls import CALLS
from tests.losses.reference import jit_quickly
from tests.support import assert_trees_close

CROSS_ENTROPY = {"label_smoothing": 0.1, "z_loss": 0.2, "logit_soft_cap": 3.0}
NUMBERS = {
    "softmax_cross_entropy": CROSS_ENTROPY,
    "linear_cross_entropy": CROSS_ENTROPY,
    "linear_log_prob": {"temperature": 2.0, "logit_soft_cap": 3.0},
    "linear_jsd": {"temperature": 2.0},
    "linear_kl_divergence": {"temperature": 2.0},
    "linear_dpo": {"beta": 0.3, "label_smoothing": 0.1, "simpo_gamma": 0.7, "cpo_alpha": 0.5, "logit_soft_cap": 3.0},
}


def loss_of(name, numbers, **differentiated):
    call = CALLS[name][-1] if isinstance(CALLS[name], list) else CALLS[name]
    outputs = jax.tree.leaves(getattr(layers, name)(**{**call(), **numbers, **differentiated}))
    return sum(y.sum() for y in outputs if jnp.issubdtype(y.dtype, jnp.floating))


def bias_of(name):
    return {"linear_jsd": "student_bias", "linear_kl_divergence": "student_bias", "softmax_cross_entropy": "logits"}.get(name, "bias")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NUMBERS)
def test_traced_numbers_give_what_known_ones_do(name, reduction):
    numbers, what = NUMBERS[name], bias_of(name)
    others = {} if name == "linear_log_prob" else {"reduction": reduction}
    call = CALLS[name][-1] if isinstance(CALLS[name], list) else CALLS[name]
    run = lambda numbers: jax.value_and_grad(lambda x: loss_of(name, {**numbers, **others}, **{what: x}))(call()[what])
    assert_trees_close(jit_quickly(run)(numbers), jit_quickly(partial(run, numbers))(), rtol=2e-5, atol=1e-6)


def test_wider_numbers_leave_the_dtype_of_the_loss():
    with jax.enable_x64(True):
        numbers = {k: jnp.float64(v) for k, v in CROSS_ENTROPY.items()}
        loss = lambda x: layers.linear_cross_entropy(x, jnp.ones((3, 7), jnp.float32), jnp.arange(5), **numbers, block_size=2)
        assert jax.eval_shape(loss, jnp.ones((5, 3), jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "number"), [("softmax_cross_entropy", "z_loss"), ("linear_cross_entropy", "label_smoothing"), ("linear_jsd", "temperature")]
)
def test_number_has_no_gradient(name, number):
    with pytest.raises(TypeError, match=f"{name}: a number among the options.* has no gradient"):
        jax.grad(lambda v: loss_of(name, {number: v}))(0.5)
