"""Training on data that is on the machine: it learns, by a command whose options are checked."""

import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import layers
from layers.tools.tasks import TASKS
from tests.tools.runs import outcome, run

COMMAND = [sys.executable, "-m", "layers", "train", "--task"]


def test_digits_reach_97_percent_on_held_out_images(tmp_path):
    done = subprocess.run([*COMMAND, "digits", "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run")["validation"]["accuracy"] >= 0.97
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0
    assert "images/s" in done.stderr


def test_resumes_after_a_kill_before_the_first_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    done = run(tmp_path / "run", "--steps", "2", "--resume")
    assert done.code == 0, done.err
    assert len(outcome(tmp_path / "run")["losses"]) == 2


def test_text_trains_on_the_standard_library(tmp_path):
    done = run(tmp_path / "run", "--task", "text", "--steps", "8", "--batch-size", "4")
    assert done.code == 0, done.err
    losses = outcome(tmp_path / "run")["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "at least 1"),
        (["--steps", "99999999999999999999"], "at most 2147483647"),
        (["--batch-size", "1.5"], "no int"),
        (["--learning-rate", "0"], "above 0"),
        (["--learning-rate", "nan"], "above 0"),
        (["--learning-rate", "inf"], "at most"),
        (["--learning-rate", "fast"], "no float"),
        (["--seed", "99999999999999999999"], "at most 4294967295"),
        (["--seed", "-1"], "at least 0"),
        (["--layers", "torch"], "invalid choice"),
        (["--out", ""], "empty"),
        (["--resume"], "no run"),
    ],
)
def test_bad_options_are_errors(tmp_path, options, message):
    done = run(tmp_path / "none", *options)
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["text-moe", "grpo"])
def test_both_ways_of_a_task_have_the_same_loss_and_gradients(name):
    def run(modules):
        task = TASKS[name](modules)
        graph, params, rest = nnx.split(task.model(nnx.Rngs(0)), nnx.Param, ...)
        batch = task.draw(jax.random.key(1), 2)
        return jax.jit(jax.value_and_grad(lambda p: task.loss(nnx.merge(graph, p, rest), batch)))(params)

    (value, gradients), (plain, expected) = run(layers), run(nnx)
    np.testing.assert_allclose(value, plain, rtol=1e-5, atol=1e-6)
    by_path = lambda tree: {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    gradients, expected = by_path(gradients), by_path(expected)
    assert gradients.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(gradients[path], x, rtol=1e-3, atol=2e-5, err_msg=path)


def test_reinforcement_learning_finds_what_is_rewarded(tmp_path):
    done = run(tmp_path / "run", "--task", "grpo", "--steps", "50", "--batch-size", "16")
    assert done.code == 0, done.err
    assert outcome(tmp_path / "run")["validation"]["digits right"] > 0.2  # by chance 0.1


def test_linear_layers_in_8_bits_learn_as_those_in_32_do():
    def losses(modules):
        task = TASKS["text-fp8"](modules)
        graph, params, rest = nnx.split(task.model(nnx.Rngs(0)), nnx.Param, ...)
        optimizer = optax.adam(3e-3)

        @jax.jit
        def step(params, moments, key):
            batch = task.draw(key, 2)
            loss, gradients = jax.value_and_grad(lambda p: task.loss(nnx.merge(graph, p, rest), batch))(params)
            updates, moments = optimizer.update(gradients, moments)
            return optax.apply_updates(params, updates), moments, loss

        moments, found = optimizer.init(params), []
        for i in range(12):
            params, moments, loss = step(params, moments, jax.random.key(i))
            found.append(float(loss))
        return np.array(found)

    ours, plain = losses(layers), losses(nnx)
    assert ours[-1] < 0.85 * ours[0]
    np.testing.assert_allclose(ours, plain, rtol=0.05)
    assert not np.allclose(ours, plain, rtol=1e-4)
