"""Which layers of the catalogue are made in a certain way, read from the source of their families."""

import pathlib
import re

import layers
from layers.checking.catalogue import catalogue

BLOCKS = r"\b(map|fold|scan)_blocks\w*\(|in_row_blocks\("
"""A call that goes through rows in blocks."""


def names_of_layers_that_call(pattern):
    """The names of those files of layers in which, or in a file of their family that they import, a call is written that fits the pattern."""
    modules = [layer.__module__ for layer in catalogue()]
    return {m.rsplit(".", 1)[1] for m in modules if any(re.search(pattern, p.read_text()) for p in _with_imports(_file(m), set()))}


def _file(module):
    return pathlib.Path(layers.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _with_imports(path, found):
    """The file and those of its folder that it imports, and so on."""
    if path not in found and path.exists():
        found.add(path)
        for base, names in re.findall(rf"^from (layers\.{path.parent.name}[\w.]*) import ([\w, ]+)", path.read_text(), re.MULTILINE):
            for module in (base, *(f"{base}.{name.strip()}" for name in names.split(","))):
                _with_imports(_file(module), found)
    return found
