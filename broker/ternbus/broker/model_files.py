"""Models in safetensors files: read as float32 tensors, and written atomically."""

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import fault, replacing
from ternbus.broker.path_errors import sentence


def load_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The floating-point tensors of a safetensors file as float32, in the file's order.

    ConfigError if the file cannot be read or has no such tensor.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - most commands do not need it

    _check_opens(path)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path} as a safetensors file: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:  # safetensors raises these for a dtype that numpy lacks
        raise ConfigError(f"{path} has a tensor of a type that numpy lacks; save the tensor as float32") from error
    floats = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.kind == "f"}
    if not floats:
        raise ConfigError(f"{path} has no floating-point tensor; give a file with a model")
    return floats


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, empty if it has none; ConfigError if the file cannot be read."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as above

    _check_opens(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path} as a safetensors file: {error}") from error


def _check_opens(path: Path) -> None:
    """The library says of every file that it cannot open that there is none. ConfigError with the system's reason."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(sentence(error, path, "cannot read ")) from error


def save_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]], about: Mapping[str, str]) -> None:
    """Write named tensors atomically, with ``about`` as the file's metadata; ConfigError if that fails.

    Equal tensors and metadata give equal bytes.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - as above
    from safetensors.numpy import save_file  # noqa: PLC0415 - as above

    arrays = {
        name: np.asarray(array, order="C") for name, array in tensors.items()
    }  # keeps shape (), unlike ascontiguousarray
    try:
        with replacing(path) as partial:
            save_file(arrays, partial, metadata=dict(about))
            _sort_metadata(Path(partial))
    except OSError as error:
        raise fault(error, path, "cannot write ") from error
    except SafetensorError as error:  # which has the system's error in its text alone
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is not None:
            raise fault(OSError(int(number[1]), os.strerror(int(number[1]))), path, "cannot write ") from error
        raise ConfigError(f"cannot write {path}: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, in place: the library writes them in the random order of its hash map."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        sorted_header = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(sorted_header.ljust(size))
