"""Imports from the folder of a task's module, for the task's own code only.

The folder is the last entry of `sys.path`, so a module of Python or of an installed library has precedence over a file
of the same name. Only modules from the folder can import others from it: if Ternbus or a library tries to import an
optional module that is not installed, it must not get a file of that name beside the task.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType, ModuleType

from ternbus.broker.own_code import OURS


class _SourceLoader(SourceFileLoader):
    """Python's own names no file in its error for a NUL byte."""

    def get_code(self, fullname: str) -> CodeType | None:
        data = self.get_data(self.path)
        if (at := data.find(b"\0")) >= 0:
            raise SyntaxError("the file has a NUL byte", (self.path, data.count(b"\n", 0, at) + 1, None, None))
        return super().get_code(fullname)


_LOADERS = (
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (_SourceLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)
_MACHINERY = {"importlib", "_frozen_importlib", "_frozen_importlib_external"}


def holds(folder: Path, module: str) -> bool:
    """Whether the folder has the file of this module, whose name may be dotted. Imports nothing."""
    places: Sequence[str] = [str(folder)]
    found: ModuleSpec | None = None
    for name in module.split("."):
        specs = (FileFinder(place, *_LOADERS).find_spec(name) for place in places)
        found = next((spec for spec in specs if spec is not None), None)
        if found is None:
            return False
        places = found.submodule_search_locations or []
    return found is not None and found.loader is not None and module.partition(".")[0] != OURS


def is_of(folder: Path, module: str, place: str) -> bool:
    """Whether the file or folder is that of the folder's own module: a virtual environment may lie below, too."""
    own = folder.joinpath(*module.split("."))
    return Path(place).parent in (own, own.parent)


def taken_by(folder: Path, module: str) -> str:
    """The path of another module with this name, or "Python" for a built-in one; empty if there is none."""
    top = module.partition(".")[0]
    loaded = sys.modules.get(top)
    spec = find_spec(top) if loaded is None else loaded.__spec__
    if spec is None or (loaded is None and spec.origin is None):  # a file has precedence over a folder elsewhere
        return ""
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or [])
    if any(is_of(folder, top, place) for place in places):
        return ""
    return places[0] if places else "Python"


def import_from(folder: Path, module: str) -> ModuleType:
    """Import a module from the folder. Raises whatever the module raises."""
    importlib.invalidate_caches()  # the file may be new, for example from a notebook
    entry = str(folder)
    if entry not in sys.path:
        _finders[entry] = finder = _Finder(entry, *_LOADERS)
        sys.path_hooks.insert(0, finder.hook)
        sys.path_importer_cache.pop(entry, None)
        sys.path.append(entry)
    if entry in _finders:  # else the folder was on the path before, for all modules
        _finders[entry].own.add(module.partition(".")[0])
    return importlib.import_module(module)


def is_on_path(entry: str) -> bool:
    """Whether `import_from` added this entry to `sys.path`."""
    return entry in _finders


class _Finder(FileFinder):
    """Finds modules in one folder for modules that it has found before; `own` has their names."""

    def __init__(self, path: str, *loaders: object) -> None:
        super().__init__(path, *loaders)  # type: ignore[arg-type]  # `_LOADERS` has the right types
        self.own: set[str] = set()

    def hook(self, path: str) -> "_Finder":
        """The entry for `sys.path_hooks`: this finder for its own folder."""
        if path != self.path:
            raise ImportError(f"this finder is for {self.path} only", path=path)
        return self

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == OURS or (fullname not in self.own and _importer() not in self.own):
            return None
        spec = super().find_spec(fullname, target)
        if spec is not None:
            self.own.add(fullname)
        return spec


_finders: dict[str, _Finder] = {}


def _importer() -> str:
    """The top-level name of the module that runs the import."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - as `warnings` and `logging` find the caller
    while frame is not None:
        top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if top not in _MACHINERY:
            return top
        frame = frame.f_back
    return ""
