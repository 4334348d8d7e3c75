"""What ends a run, in words for the person who started it."""

from __future__ import annotations

import os


class RunError(RuntimeError):
    """A run cannot start or go on: one line that says why. What was written before is whole.

    Attributes:
        code: exit code of the command line: 2 where the options are at fault, 1 where the run or the machine is.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(f"train: {message}")
        self.code = code


def reason(error: BaseException) -> str:
    """What the operating system said, in one line."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
