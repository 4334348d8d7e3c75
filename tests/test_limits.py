"""A score, a rate or the input of a gate that is infinite gives what ever larger ones tend to: value, gradients and tangents.

Each case is a good call (`good_calls.py`) in which some entries of some arguments are infinite. It is compared with the call in which they are
finite, and so large already that nothing is left of their exponentials in float32: 0 times infinity would show as NaN, in forward mode also where
what moves is something else.
"""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

LARGE = 1e6
LABELS = jnp.array([2, 6, -100, 1, 1])
PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_soft_cap": None}
ROWS = {**PLAIN, "reduction": "none", "return_logsumexp": True}
SOFT = jax.nn.one_hot(jnp.array([2, 6, 1, 1, 3]), 7) * 0.75 + jax.nn.one_hot(5, 7) * 0.25
ENDS = [-math.inf, math.inf]


def low(*names):
    return [(names, -math.inf)]


CASES = {
    "softmax_cross_entropy": [
        (low("logits"), {**PLAIN, "labels": LABELS}),
        (low("logits"), {**PLAIN, "labels": SOFT}),
        (low("logits"), ROWS | {"labels": SOFT}),
    ],
    "linear_cross_entropy": [
        (low("bias"), {**PLAIN, "labels": LABELS}),
        (low("bias"), {**PLAIN, "labels": SOFT}),
        (low("bias"), ROWS | {"labels": SOFT}),
    ],
    "linear_log_prob": [(low("bias"), {"ids": LABELS, "logit_soft_cap": None})],
    "linear_dpo": [(low("bias"), {"logit_soft_cap": None, "chosen_labels": jnp.full((2, 3), 1), "rejected_labels": jnp.full((2, 5), 2)})],
    "linear_jsd": [(low("student_bias"), {}), (low("teacher_bias"), {}), (low("student_bias", "teacher_bias"), {"reduction": "none"})],
    "linear_kl_divergence": [(low("teacher_bias"), {}), (low("student_bias", "teacher_bias"), {"reduction": "none"})],
    "dot_product_attention": [(low("bias"), {}), (low("sinks"), {"dropout_rate": 0.0})],
    "selective_scan": [(low("A"), {}), (low("z"), {}), (low("delta_bias"), {})],
    "state_space_dual": [(low("A"), {}), (low("z"), {}), (low("dt_bias"), {}), (low("A"), {"segment_ids": None, "chunk_size": 4})],
    "gated_linear_attention": [(low("g"), {})],
    "gated_delta_rule": [(low("g"), {})],
    "lstm": [([(("bias",), end)], {}) for end in ENDS],
    "gru": [([(("bias",), end)], {}) for end in ENDS],
    "short_convolution": [(low("bias"), {"activation": name}) for name in ("silu", "tanh")],
    "mlp": [(low("up_bias"), {"activation": name}) for name in ("gelu", "mish")],
    "gated_mlp": [(low("gate_bias"), {"activation": "silu"})],
}
FAMILIES = ("attention", "losses", "perceptrons", "recurrent")


def good_call(name):
    for family in FAMILIES:
        call = importlib.import_module(f"tests.{family}.good_calls").CALLS.get(name)
        if call is not None:
            return (call[0] if isinstance(call, list) else call)()
    raise KeyError(name)


def everything(fn, moving):
    """Value, gradients and tangents: along every argument at once, along each alone, and along none."""
    value, pull = jax.vjp(fn, moving)
    grads = pull([(1.5 + jnp.cos(jnp.arange(y.size, dtype=y.dtype))).reshape(y.shape) for y in value])
    rows = jnp.concatenate([jnp.ones((1, len(moving))), jnp.zeros((1, len(moving))), jnp.eye(len(moving))])
    ways = {
        k: jnp.multiply.outer(row, (1.5 + jnp.sin(jnp.arange(x.size))).reshape(x.shape)) for row, (k, x) in zip(rows.T, moving.items(), strict=True)
    }
    return value, grads, jax.vmap(lambda t: jax.jvp(fn, (moving,), (t,))[1])(ways)


@pytest.mark.parametrize(("name", "places", "options"), [(n, *case) for n, cases in CASES.items() for case in cases])
def test_infinite_entries_are_the_limit_of_large_ones(name, places, options):
    given = {k: v for k, v in (good_call(name) | options).items() if v is not None}
    moving = {
        k: v for k, v in given.items() if isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.floating) and k not in ("where", "class_weights")
    }
    for k in ("teacher_x", "teacher_kernel", "teacher_bias"):
        moving.pop(k, None)

    def found(number):
        args = dict(given)
        for names, end in places:
            for k in names:
                args[k] = given[k].at[..., 0].set(number if end > 0 else -number)

        def fn(moving):
            out = getattr(layers, name)(**(args | moving))
            return [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.floating)]

        return everything(fn, {k: args[k] for k in moving})

    run = jax.jit(found)
    for a, b in zip(jax.tree.leaves(run(math.inf)), jax.tree.leaves(run(LARGE)), strict=True):
        b = np.where(np.abs(b) > LARGE / 100, np.copysign(np.inf, b), b)  # what grows with them
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["selective_scan", "state_space_dual"])
def test_gate_that_is_infinite_has_the_slope_of_an_open_one(name):
    given = good_call(name)
    run = jax.jit(jax.grad(lambda z: getattr(layers, name)(**{**given, "z": z})[0].sum()))
    np.testing.assert_allclose(run(given["z"].at[0, 0].set(jnp.inf))[0, 0], run(given["z"].at[0, 0].set(100.0))[0, 0], rtol=1e-6)


def test_tangent_of_zero_is_zero_whatever_the_kernel():
    """The logits are capped, so that the loss is finite, and the gradient of the features is not."""
    given = good_call("linear_cross_entropy")
    x, kernel = given["x"].at[0, 0].set(jnp.inf), given["kernel"].at[0].set(jnp.abs(given["kernel"][0]))
    loss = lambda x, kernel: layers.linear_cross_entropy(x, kernel, LABELS, logit_soft_cap=3.0)
    value, tangent = jax.jit(lambda *args: jax.jvp(loss, args, (jnp.zeros_like(x), jnp.zeros_like(kernel))))(x, kernel)
    assert jnp.isfinite(value) and tangent == 0
