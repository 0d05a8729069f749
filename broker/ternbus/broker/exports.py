"""Public names of a package, imported when they are first asked for (PEP 562).

So a package's `__init__` offers names from rooms that load PyTorch or an MQTT client, and is itself quick to import.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def exports(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package; `names` has the public names by the module that each comes from."""
    places = {name: module for module, group in names.items() for name in group}

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(__import__(places[name], fromlist=[name]), name)  # as `from MODULE import NAME`
        setattr(sys.modules[package], name, found)
        return found

    return find, lambda: sorted({*vars(sys.modules[package]), *places})
