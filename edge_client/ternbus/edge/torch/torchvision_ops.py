"""A workaround for torchvision built for CUDA with torch built for the CPU; import it before torchvision.

pip installs such a pair if torch comes from the CPU index and torchvision from PyPI. torchvision's compiled operators
then do not load, and `import torchvision` fails with "operator torchvision::nms does not exist", although data sets and
transforms need none of them.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A definition lives as long as the object that made it.
_libraries: list[torch.library.Library] = []


def _load_compiled() -> None:
    """Load torchvision's own operators as its import does, if possible; loading them twice is harmless."""
    spec = find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or []:
        for suffix in [*EXTENSION_SUFFIXES, ".so"]:
            path = Path(folder) / f"_C{suffix}"
            if path.is_file():
                try:
                    torch.ops.load_library(path)
                except OSError:
                    continue  # the case in question: CUDA's libraries are missing


def _define_missing() -> None:
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)


_load_compiled()
_define_missing()
