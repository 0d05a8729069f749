"""Models in safetensors files: read as float32 tensors, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import replacing


def load_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The floating-point tensors of a safetensors file as float32, in the file's order."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - a device that only follows never needs it

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is not a safetensors file that can be read: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:  # what safetensors raises for a dtype numpy lacks
        raise ConfigError(f"{path} holds a tensor of a type that numpy lacks; save it as float32") from error
    floats = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.kind == "f"}
    if not floats:
        raise ConfigError(f"{path} holds no floating-point tensor")
    return floats


def save_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]], about: Mapping[str, str]) -> None:
    """Write named tensors, whole or not at all; ``about`` becomes the file's metadata."""
    from safetensors import SafetensorError  # noqa: PLC0415 - as above
    from safetensors.numpy import save_file  # noqa: PLC0415 - as above

    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # a scalar stays one
    try:
        with replacing(path) as partial:
            save_file(arrays, partial, metadata=dict(about))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
