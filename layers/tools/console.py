"""Output that a closed pipe or terminal does not turn into the end of a run."""

from __future__ import annotations

import os
from typing import Any


def lasting(stream: Any) -> Any:
    """The text stream, but that output goes nowhere once it cannot be written."""
    return _Lasting(stream)


class _Lasting:
    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Any, *args: Any) -> None:
        try:
            do(*args)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
