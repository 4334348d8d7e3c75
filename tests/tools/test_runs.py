"""A run loses nothing: kills, signals, damage, full and vanishing folders, wrong options, numbers that are not finite; each with a real process."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from layers.tools.checkpoints import Checkpoints
from tests.tools.runs import SMALL, Training, outcome, run, steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 60 steps from beginning to end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run(folder, "--steps", "60")
    assert done.code == 0, done.err
    assert steps(folder) == [40, 60]
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def files(folder, step):
    """The files of a checkpoint, largest first."""
    return sorted((p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)


def assert_refused(done, code, *words):
    """One line that holds the words, and nothing else."""
    assert done.code == code, done.err
    assert len(done.lines) == 1, done.err
    for word in words:
        assert word in done.lines[0]


def test_kill_at_a_checkpoint_is_gone_on_from_bit_for_bit(whole, tmp_path):
    victim = Training(tmp_path / "run", "--steps", "60")
    victim.wait_for_checkpoint()
    victim.send(signal.SIGKILL)
    victim.process.join()
    assert not (tmp_path / "run" / "metrics.json").exists()
    done = run(tmp_path / "run", "--resume")
    assert done.code == 0, done.err
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signal_ends_the_step_and_writes_a_checkpoint(number, whole, tmp_path):
    folder = tmp_path / "run"
    victim = subprocess.Popen(
        [sys.executable, "-m", "layers", "train", *SMALL, "--steps", "60", "--out", str(folder)], stderr=subprocess.PIPE, text=True
    )
    while not (folder / "run.json").exists() and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(number)
    said = victim.communicate()[1]
    assert victim.returncode == 128 + number, said
    assert "Traceback" not in said and f"{number.name}: stopped after step {steps(folder)[-1]}; --resume goes on" in said
    assert run(folder, "--resume").code == 0
    assert outcome(folder) == outcome(whole)


def zero_200_bytes(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4)
        file.write(bytes(200))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [zero_200_bytes, flip_a_bit, cut, empty, os.remove], ids=lambda f: f.__name__)
def test_harm_to_any_file_of_a_checkpoint_is_seen(harm, whole, tmp_path):
    for i, original in enumerate(p for p in files(whole, 60) if p.stat().st_size):
        folder = shutil.copytree(whole / "checkpoints", tmp_path / str(i))
        harm(folder / original.relative_to(whole / "checkpoints"))
        step, wrong = Checkpoints(folder).newest_whole()
        assert step == 40 and list(wrong) == [60], original


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(copied, whole):
    zero_200_bytes(files(copied, 60)[0])
    (copied / "metrics.json").unlink()
    done = run(copied, "--resume")
    assert done.code == 0, done.err
    assert len(done.lines) == 1 and "checkpoint 60 is damaged" in done.lines[0] and "going on from 40" in done.lines[0]
    assert outcome(copied) == outcome(whole)
    assert (copied / "checkpoints" / "60.damaged").exists()


def test_run_without_a_whole_checkpoint_is_refused_and_kept(copied):
    for step in (40, 60):
        cut(files(copied, step)[0])
    assert_refused(run(copied, "--resume"), 1, "no checkpoint in", "is whole")
    assert steps(copied) == [40, 60]


@pytest.mark.parametrize(
    ("rate", "first"),
    [("1e30", "the output of head"), ("3e38", "the output of hidden")],
)
def test_step_that_is_not_finite_ends_the_run_with_the_state_before_it(rate, first, tmp_path):
    done = run(tmp_path / "run", "--learning-rate", rate, "--steps", "40")
    assert_refused(done, 1, "is not finite", f"first in {first}", "kept as checkpoint")
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest_whole() == (steps(tmp_path / "run")[-1], {})
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("--seed", "1", "0"),
        ("--batch-size", "8", "16"),
        ("--learning-rate", "0.1", "0.003"),
        ("--task", "text", "digits"),
        ("--layers", "flax", "ours"),
    ],
)
def test_option_that_changes_what_is_trained_is_refused_at_resume(option, value, was, copied):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    assert_refused(run(copied, "--resume", option, value), 2, f"{option} {value} was given", f"made with {was}")
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_more_steps_are_no_other_run(copied):
    assert run(copied, "--resume", "--steps", "70").code == 0
    assert len(outcome(copied)["losses"]) == 70
    assert_refused(run(copied, "--resume", "--steps", "60"), 2, "at step 70 already")


def test_another_run_in_the_folder_is_refused(copied):
    assert_refused(run(copied), 2, "holds a run already", "--resume")


def test_folder_that_another_process_trains_in_is_refused(tmp_path):
    first = Training(tmp_path / "run", "--steps", "20000")
    first.wait_for_checkpoint()
    assert_refused(run(tmp_path / "run", "--resume"), 2, "another process trains in")
    first.send(signal.SIGTERM)
    assert first.end().code == 143


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert_refused(
            run(tmp_path / out if out == "file" else tmp_path / "other", "--out", str(tmp_path / out)), 1, f"{tmp_path / 'file'} is a file"
        )
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_vanishes_ends_the_run_and_can_come_back(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    victim = Training(folder, "--steps", "20000")
    victim.wait_for_checkpoint()
    folder.rename(away)
    assert_refused(victim.end(), 1, "cannot be written", "No such file")
    assert not folder.exists()
    step, wrong = Checkpoints(away / "checkpoints").newest_whole()
    assert step and not wrong
    assert run(away, "--resume", "--steps", str(step + 1)).code == 0


def no_file_above_100_kilobytes():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(copied):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    done = run(copied, "--resume", "--steps", "70", prepare=no_file_above_100_kilobytes)
    assert_refused(done, 1, "the checkpoint of step 70 cannot be written", "File too large", "goes on from checkpoint 60")
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and p.name != "run.json"} == {
        p: c for p, c in before.items() if p.name != "run.json"
    }
    assert run(copied, "--resume", "--steps", "70").code == 0


FULL_DISK = """
mkdir "$1" && mount -t tmpfs -o size=600k tmpfs "$1" || exit 77
shift_out="$1"; shift
"$@" --out "$shift_out/run"; echo "full: $?"
mount -o remount,ro "$shift_out"; "$@" --resume --out "$shift_out/run"; echo "read-only: $?"
mount -o remount,rw,size=5m "$shift_out"; "$@" --resume --out "$shift_out/run"; echo "room: $?"
mkdir "$shift_out/../result" && cp "$shift_out/run/metrics.json" "$shift_out/../result/"
"""


def test_full_and_read_only_disks_end_the_run_which_goes_on_when_there_is_room(whole, tmp_path):
    command = [sys.executable, "-m", "layers", "train", *SMALL, "--steps", "60"]
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", str(tmp_path / "disk"), *command]
    if shutil.which("unshare") is None:
        pytest.skip("a disk of its own needs unshare")
    done = subprocess.run(unshared, capture_output=True, text=True)
    if "full: " not in done.stdout:
        pytest.skip(f"a disk of its own is not allowed here: {done.stderr}")
    assert [line for line in done.stdout.splitlines() if ":" in line and line.split(":")[0] in ("full", "read-only", "room")] == [
        "full: 1",
        "read-only: 1",
        "room: 0",
    ], done.stderr
    assert "No space left on device" in done.stderr and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    assert outcome(tmp_path / "result") == outcome(whole)


def test_closed_pipe_is_no_end_of_a_run(tmp_path):
    command = [sys.executable, "-m", "layers", "train", *SMALL, "--steps", "20", "--out", str(tmp_path / "run")]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    victim.stdout.close()
    victim.stderr.close()
    assert victim.wait() == 0
    assert len(outcome(tmp_path / "run")["losses"]) == 20
