"""Checkpoints that are whole or are not used.

`checkpoints/STEP/` holds `state.npz`, the arrays by their paths, `run.json`, which says how the run was made, and `SHA256SUMS` of both, which
`sha256sum -c` reads too. It is made under another name, synced, and renamed: it is there with its sums or not at all. Before a checkpoint is
restored, its sums are compared; one that differs is set aside as `STEP.damaged`. NumPy writes the arrays, in one piece and from this thread, so
that a disk that is full is an error like any other (tensorstore's threads print theirs).
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.tools.run_error import RunError, reason
from layers.tools.whole_files import sync_folder, write_whole

KEPT = 2
_SUMS, _STATE, _HOW, _UNFINISHED = "SHA256SUMS", "state.npz", "run.json", "unfinished-"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[int]:
        """Those that are there, damaged or not, newest first."""
        return sorted((int(p.name) for p in self.folder.glob("*") if p.name.isdecimal()), reverse=True)

    def newest_whole(self) -> tuple[int | None, dict[int, str]]:
        """The newest one that is as it was written, and what is wrong with each that is newer."""
        wrong: dict[int, str] = {}
        for step in self.steps():
            damage = _damage(self.folder / str(step))
            if not damage:
                return step, wrong
            wrong[step] = damage
        return None, wrong

    def how_made(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / str(step) / _HOW).read_text())

    def restore(self, step: int, like: Any) -> Any:
        """The state of a checkpoint, a pytree of the structure of `like`.

        Raises:
            RunError: where it is that of another model.
        """
        with np.load(self.folder / str(step) / _STATE) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        leaves, tree = jax.tree_util.tree_flatten_with_path(like)
        for path, leaf in leaves:
            array = found.get(name := jax.tree_util.keystr(path))
            if array is None or (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                have = "no" if array is None else f"{array.dtype}{list(array.shape)} as"
                raise RunError(f"checkpoint {step} in {self.folder} is of another model: it has {have} {name}, not {leaf.dtype}{list(leaf.shape)}")
        return tree.unflatten([jnp.asarray(found[jax.tree_util.keystr(path)]) for path, _ in leaves])

    def set_aside(self, steps: Any) -> None:
        """Renames damaged ones, out of the way of those to come."""
        for step in steps:
            aside = self.folder / f"{step}.damaged"
            _remove(aside)
            (self.folder / str(step)).rename(aside)

    def save(self, step: int, state: Any, how: dict[str, Any]) -> None:
        """Writes a checkpoint and then removes all but the newest ones.

        Raises:
            RunError: where that is not possible; the checkpoints before are as they were.
        """
        unfinished = self.folder / f"{_UNFINISHED}{step}"
        try:
            self.remove_unfinished()
            unfinished.mkdir()
            write_whole(unfinished / _STATE, _packed(state))
            write_whole(unfinished / _HOW, json.dumps(how, indent=1).encode())
            write_whole(unfinished / _SUMS, "".join(f"{digest}  {name}\n" for name, digest in _digests(unfinished).items()).encode())
            unfinished.rename(self.folder / str(step))
            sync_folder(self.folder)
        except OSError as error:
            _remove(unfinished)
            before = f"; --resume goes on from checkpoint {self.steps()[0]}" if self.steps() else ""
            raise RunError(f"the checkpoint of step {step} cannot be written to {self.folder}: {reason(error)}{before}") from error
        for old in self.steps()[KEPT:]:
            _remove(self.folder / str(old))

    def remove_unfinished(self) -> None:
        """Removes what a kill left of a checkpoint that was being written."""
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            _remove(left)


def _packed(state: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)})  # type: ignore[arg-type]
    return content.getvalue()


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file below `folder`, by its name there; hidden ones do not count."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SUMS and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" where it is as it was written."""
    try:
        lines = (folder / _SUMS).read_text().splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = _digests(folder)
    except (OSError, UnicodeDecodeError) as error:
        return f"{_SUMS}: {reason(error)}"
    for name in sorted({_HOW, _STATE, *expected, *found}):
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected.get(name):
            return f"{name} is not what was written"
    return ""


def _remove(path: Path) -> None:
    """Removes a file or folder that may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
