"""Real processes that train, forked from one that has the imports behind it, and their folders."""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # the processes compile more than they run
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["layers.tools.train", "layers.tools.cli"])
SMALL = ("--task", "digits", "--batch-size", "16", "--checkpoint-every", "20")


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self):
        """The lines of stderr but for the progress bar: what the run says."""
        return [line for line in self.err.splitlines() if line.strip() and "images/s" not in line and "━" not in line]


class Training:
    """`python -m layers train --out FOLDER ...` as a process."""

    def __init__(self, folder, *arguments, prepare=None):
        self.log = folder.parent / f"{folder.name}-{time.monotonic_ns()}"
        self.process = _CONTEXT.Process(target=_main, args=(["train", *SMALL, "--out", str(folder), *arguments], str(self.log), prepare))
        self.folder = folder
        self.process.start()

    def wait_for_checkpoint(self):
        deadline = time.monotonic() + 60
        while not steps(self.folder) and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert steps(self.folder), self.end().err

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        self.process.join(120)
        assert self.process.exitcode is not None, "does not end"
        return Done(self.process.exitcode, self.log.with_suffix(".out").read_text(), self.log.with_suffix(".err").read_text())


def _main(arguments, log, prepare):
    for number, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + ending, os.O_CREAT | os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()
    from layers.tools.cli import main

    sys.exit(main(arguments))


def run(folder, *arguments, prepare=None):
    return Training(folder, *arguments, prepare=prepare).end()


def steps(folder):
    """The checkpoints that are there."""
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal())


def outcome(folder):
    return json.loads((folder / "metrics.json").read_text())
