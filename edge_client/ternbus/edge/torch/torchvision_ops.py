"""Import this before torchvision: it makes a torchvision built for CUDA usable beside a torch built for the CPU.

Such a pair is what pip installs where torch comes from the CPU index and torchvision from PyPI. torchvision's compiled
operators then do not load, and `import torchvision` ends in "operator torchvision::nms does not exist", though
data sets and transforms need none of them.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A definition lasts as long as the object that made it.
_libraries: list[torch.library.Library] = []


def _load_compiled() -> None:
    """Load torchvision's own operators as its import would (loading them twice is harmless), if they load at all."""
    spec = find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or []:
        for suffix in [*EXTENSION_SUFFIXES, ".so"]:
            path = Path(folder) / f"_C{suffix}"
            if path.is_file():
                try:
                    torch.ops.load_library(path)
                except OSError:
                    continue  # the very case: libraries of CUDA that are not here


def _define_missing() -> None:
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)


_load_compiled()
_define_missing()
