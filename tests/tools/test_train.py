"""Training on data that is on the machine: it learns, by a command whose options are checked."""

import subprocess
import sys

import pytest

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
