"""Good calls of the losses, for `tests/test_bad_input.py`."""

import jax.numpy as jnp

from tests.support import draw_normal

LABELS = jnp.array([2, 6, 3, 0, 1])


def normal(*shape, seed=0):
    return draw_normal(seed, shape)


def _options(**more):
    return {"ignore_index": 3, "logit_soft_cap": 3.0, "block_size": 2} | more


def _cross_entropy():
    return _options(
        labels=LABELS,
        label_smoothing=0.1,
        z_loss=0.1,
        class_weights=jnp.array([0.5, 2.0, 1.0, 0.3, 3.0, 1.5, 0.7]),
        where=jnp.array([1.0, 0.5, 1.0, 2.0, 3.0]),
        reduction="mean",
        return_logsumexp=False,
        return_accuracy=False,
        return_entropy=True,
    )


def _heads():
    student = {"student_x": normal(5, 3), "student_kernel": normal(3, 7, seed=1), "student_bias": normal(7, seed=2)}
    teacher = {"teacher_x": normal(5, 2, seed=3), "teacher_kernel": normal(2, 7, seed=4), "teacher_bias": normal(7, seed=5)}
    return student | teacher | {"mask": LABELS != 3, "where": jnp.array([1.0, 0.5, 1.0, 2.0, 3.0]), "temperature": 2.0, "reduction": "mean"}


def _pairs():
    pairs = {"chosen_x": normal(2, 3, 4), "rejected_x": normal(2, 5, 4, seed=1), "kernel": normal(4, 7, seed=2), "bias": normal(7, seed=3)}
    labels = {"chosen_labels": jnp.array([[1, 2, 6], [0, 0, 3]]), "rejected_labels": jnp.array([[1, 2, 6, 0, 3], [0, 0, 3, 4, 5]])}
    return pairs | labels | _options(loss_type="sigmoid", beta=0.3, label_smoothing=0.1, reduction="mean", return_rewards=False)


def _sampled():
    return _options(
        x=normal(2, 3, 4),
        kernel=normal(4, 7, seed=1),
        ids=jnp.array([[1, 2, 6], [0, 3, 4]]),
        advantages=normal(2, seed=2),
        bias=normal(7, seed=3),
        old_log_probs=-(normal(2, 3, seed=4) ** 2),
        where=jnp.array([[1.0, 2.0, 0.5], [1.0, 0.0, 1.0]]),
        temperature=0.7,
        epsilon=0.1,
        epsilon_high=0.3,
        delta=2.0,
        return_metrics=False,
    )


CALLS = {
    "linear_cross_entropy": lambda: {"x": normal(5, 3), "kernel": normal(3, 7, seed=1), "bias": normal(7, seed=2)} | _cross_entropy(),
    "softmax_cross_entropy": lambda: {"logits": normal(5, 7)} | _cross_entropy(),
    "linear_jsd": lambda: _heads() | {"beta": 0.3, "block_size": 2},
    "linear_kl_divergence": lambda: _heads() | {"block_size": 2},
    "linear_log_prob": lambda: (
        _options(x=normal(5, 3), kernel=normal(3, 7, seed=1), ids=LABELS, bias=normal(7, seed=2), temperature=2.0)
        | {"return_logsumexp": False, "return_entropy": True, "return_rank": True}
    ),
    "linear_grpo": [
        lambda: (
            _sampled()
            | {"loss_type": "dr_grpo", "reference_log_probs": -(normal(2, 3, seed=5) ** 2), "beta": 0.1}
            | {"importance_sampling_level": "sequence", "max_completion_length": 5}
        ),
        lambda: (
            _sampled()
            | {"old_log_probs": None, "old_x": normal(2, 3, 2, seed=5), "old_kernel": normal(2, 7, seed=6), "old_bias": normal(7, seed=7)}
            | {"reference_x": normal(2, 3, 2, seed=8), "reference_kernel": normal(2, 7, seed=9), "reference_bias": normal(7, seed=10)}
            | {"num_items": 9.0, "beta": 0.1}
        ),
    ],
    "linear_ppo": lambda: _sampled() | {"entropy_coefficient": 0.1},
    "linear_orpo": lambda: (
        {k: v for k, v in _pairs().items() if k not in ("loss_type", "label_smoothing")}
        | {"where": jnp.array([1.0, 2.0]), "chosen_where": jnp.array([[1.0, 2.0, 0.5], [1.0, 0.0, 1.0]])}
    ),
    "linear_kto": lambda: _options(
        x=normal(2, 3, 4),
        kernel=normal(4, 7, seed=1),
        labels=jnp.array([[1, 2, 6], [0, 3, 4]]),
        desirable=jnp.array([True, False]),
        bias=normal(7, seed=3),
        reference_x=normal(2, 3, 2, seed=4),
        reference_kernel=normal(2, 7, seed=5),
        loss_type="kto",
        beta=0.3,
        kl=0.1,
        desirable_weight=1.5,
        where=jnp.array([1.0, 2.0]),
        token_where=jnp.array([[1.0, 2.0, 0.5], [1.0, 0.0, 1.0]]),
        reduction="mean",
        return_rewards=False,
    ),
    "linear_dpo": [
        lambda: (
            _pairs()
            | {"reference_chosen_x": normal(2, 3, 2, seed=4), "reference_rejected_x": normal(2, 5, 2, seed=5)}
            | {"reference_kernel": normal(2, 7, seed=6), "reference_bias": normal(7, seed=7)}
        ),
        lambda: (
            _pairs()
            | {"loss_type": "cpo", "average_log_prob": True, "cpo_alpha": 0.5, "simpo_gamma": 0.5, "where": jnp.array([1.0, 2.0])}
            | {"chosen_where": jnp.array([[1.0, 2.0, 0.5], [1.0, 0.0, 1.0]])}
        ),
    ],
}
