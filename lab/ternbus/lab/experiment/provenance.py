"""What a run was made of: the code of its task, its data, and the version of Ternbus.

A finished run counts only so long as all three are the same. Code is what the task's module and the modules that it
imports from its folder contain; modules that are imported by a computed name are not found. Of a task that is installed
it is the package that the module is in. Data are the names, sizes and times of change of the files in the folder. Files
that are added do not count: a task may keep what it has computed beside its data.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any, Final

from ternbus.broker.files import write_text
from ternbus.broker.version import software
from ternbus.edge.learn.task_loader import source_of

DATA: Final = "data.json"  # in the folder of an experiment: by folder of data, its files, and a name for them

Files = dict[str, list[int]]
"""(size in bytes, time of change in ns) by path in the folder."""


class Provenance:
    """Of the runs of one experiment, whose folder keeps what their data were."""

    def __init__(self, folder: Path) -> None:
        self._kept = folder / DATA
        self._code: dict[str, str] = {}
        self._data: dict[Path, str] = {}

    def of(self, task: str, data: Path | None) -> dict[str, str]:
        """Of a run of this task. Raises `ConfigError` if there is no such task."""
        if task not in self._code:
            self._code[task] = code_digest(task)
        if data is not None and data not in self._data:
            self._data[data] = self._named(data)
        return {"software": software(), "task": self._code[task], "data": self._data[data] if data is not None else ""}

    def _named(self, data: Path) -> str:
        """The name of these data: the known one, if all files that had it are as they were."""
        everything, found, where = self._read(), _files(data), str(data.resolve())
        known = everything.get(where)
        if known is not None and known["files"].items() <= found.items():
            return str(known["name"])
        everything[where] = {"name": _digest({path: str(about) for path, about in found.items()}), "files": found}
        write_text(self._kept, json.dumps(everything) + "\n")
        return str(everything[where]["name"])

    def _read(self) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads(self._kept.read_text(encoding="utf-8"))
            return {where: {"name": each["name"], "files": dict(each["files"])} for where, each in kept.items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def code_digest(task: str) -> str:
    """A digest of the task's code. Raises `ConfigError` if there is no such module."""
    folder, module = source_of(task)
    paths = _installed(module) if folder is None else _imported(folder, module)
    return _digest(
        {path.name if folder is None else str(path.relative_to(folder)): path.read_bytes() for path in paths}
    )


def _imported(folder: Path, module: str) -> list[Path]:
    """The files of the module and of what it imports from its folder."""
    finder = ModuleFinder(path=[str(folder)])
    try:
        finder.import_hook(module)
    except (ImportError, SyntaxError, ValueError):  # the run itself says it in words
        return []
    files = (getattr(each, "__file__", None) for each in finder.modules.values())
    return [Path(each) for each in files if each is not None]


def _installed(module: str) -> list[Path]:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return []
    origin = Path(found.origin)
    return sorted(origin.parent.glob("*.py")) if "." in module else [origin]


def _files(folder: Path) -> Files:
    found: Files = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file():  # not a broken link
                about = path.stat()
                found[str(path.relative_to(folder))] = [about.st_size, about.st_mtime_ns]
    return found


def _digest(parts: Mapping[str, str | bytes]) -> str:
    state = blake2b(digest_size=16)
    for name, content in sorted(parts.items()):
        encoded = content.encode() if isinstance(content, str) else content
        for each in (name.encode("utf-8", "surrogateescape"), encoded):
            state.update(len(each).to_bytes(8, "big") + each)
    return state.hexdigest()
