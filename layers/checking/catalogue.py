"""The layers that the contract holds for."""

from __future__ import annotations

import importlib
import pkgutil

from layers.function.function import Function


def catalogue() -> list[type[Function]]:
    """Every `Function` of the library that has an `example`, by name."""
    import layers

    found = {}
    for module in pkgutil.walk_packages(layers.__path__, "layers."):
        if module.name.split(".")[1] in ("core", "function", "kernels", "checking", "tools", "linen", "swapping", "__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Function) and "example" in vars(value):
                found[value.__name__] = value
    return [found[name] for name in sorted(found)]
