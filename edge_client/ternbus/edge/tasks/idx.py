"""A reader of idx files, the format of MNIST and similar data sets, with numpy alone; gzip or not."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError

_KINDS = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read(folder: Path, name: str) -> npt.NDArray[Any]:
    """The array in `folder/name` or `folder/name.gz`, in this machine's byte order.

    The format is two zero bytes, the type of the numbers, the number of dimensions, their sizes as big-endian int32,
    then the numbers (LeCun, "The MNIST database"). Raises `ConfigError`, with the path.
    """
    packed, plain = folder / f"{name}.gz", folder / name
    path = packed if packed.exists() and not plain.exists() else plain
    try:
        content = gzip.decompress(path.read_bytes()) if path is packed else path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"no file {plain} or {packed.name}: put the data set there, or correct --data") from error
    except (OSError, EOFError, zlib.error) as error:  # OSError includes gzip.BadGzipFile
        raise ConfigError(f"cannot read {path}: {error}; replace the file") from error
    if len(content) < 4 or content[2] not in _KINDS or len(content) < 4 + 4 * content[3]:
        raise ConfigError(f"{path} is not an idx file: replace it")
    sizes = np.frombuffer(content, ">i4", content[3], offset=4).tolist()
    numbers = np.frombuffer(content, _KINDS[content[2]], offset=4 + 4 * content[3])
    if len(numbers) != math.prod(sizes):
        shape = "x".join(map(str, sizes))
        raise ConfigError(f"{path} has {len(numbers)} numbers, but its header {shape}: replace the file")
    return numbers.reshape(sizes).astype(numbers.dtype.newbyteorder("="))


def images_and_labels(folder: Path, split: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """(images [samples, 1, height, width], labels) of the files of MNIST's names; the test part is of `t10k`."""
    prefix = "train" if split == "train" else "t10k"
    images = read(folder, f"{prefix}-images-idx3-ubyte")
    return images[:, np.newaxis], read(folder, f"{prefix}-labels-idx1-ubyte").astype(np.int64)
