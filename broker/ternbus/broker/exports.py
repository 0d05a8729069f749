"""Lazy imports of a package's public names, on first access (PEP 562).

A package's `__init__` can then export names from modules that load PyTorch or an MQTT client, and still import fast.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def exports(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for the package; ``names`` has the public names of each module."""
    places = {name: module for module, group in names.items() for name in group}

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            found = getattr(__import__(places[name], fromlist=[name]), name)  # as `from MODULE import NAME`
        except ModuleNotFoundError as error:
            if error.name not in {"torch", "torchvision"}:
                raise
            text = f"{package}.{name} needs {error.name}: pip install torch torchvision"
            raise ModuleNotFoundError(text, name=error.name) from error
        setattr(sys.modules[package], name, found)
        return found

    return find, lambda: sorted({*vars(sys.modules[package]), *places})
