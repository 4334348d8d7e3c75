"""Training on data that is on the machine: it learns, and goes on bit for bit after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "layers", "train", "--task", "digits", "--batch-size", "16", "--checkpoint-every", "20"]


def run(folder, *more):
    return subprocess.run([*COMMAND, "--out", str(folder), *more], capture_output=True, text=True)


def outcome(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_digits_reach_97_percent_on_held_out_images(tmp_path):
    done = subprocess.run([*COMMAND[:6], "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run")["validation"]["accuracy"] >= 0.97
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0
    assert "images/s" in done.stderr


def test_resumes_bit_for_bit_after_a_kill(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, "--steps", "100").returncode == 0
    victim = subprocess.Popen([*COMMAND, "--out", str(broken), "--steps", "100"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 50
    while not any(p.name.isdigit() for p in broken.glob("checkpoints/*")) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (broken / "metrics.json").exists()
    done = run(broken, "--steps", "100", "--resume")
    assert done.returncode == 0, done.stderr
    assert outcome(broken) == outcome(whole)


def test_resumes_after_a_kill_before_the_first_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    done = run(tmp_path / "run", "--steps", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert len(outcome(tmp_path / "run")["losses"]) == 2


def test_text_trains_on_the_standard_library(tmp_path):
    command = [sys.executable, "-m", "layers", "train", "--task", "text", "--steps", "8", "--batch-size", "4", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = outcome(tmp_path / "run")["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "at least 1"),
        (["--learning-rate", "0"], "above 0"),
        (["--learning-rate", "fast"], "no float"),
        (["--layers", "torch"], "invalid choice"),
        (["--resume"], "no run"),
    ],
)
def test_bad_options_are_errors(tmp_path, options, message):
    done = run(tmp_path / "none", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    assert run(tmp_path, "--steps", "2").returncode == 0
    done = run(tmp_path, "--steps", "2")
    assert done.returncode == 2
    assert "--resume" in done.stderr
