"""CIFAR-10 in its binary form (cifar-10-batches-bin/*.bin in --data DIR), its normalization, and crops and flips."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.torch import torchvision_ops  # noqa: F401 - must come before torchvision
from ternbus.edge.torch.torch_task import Split

from torchvision.transforms import v2  # isort: skip

CLASSES = 10
ROW_BYTES = 1 + 3 * 32 * 32  # a label, then the red, green and blue rows
FOLDER = "cifar-10-batches-bin"
FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training part's pixels in 0…1

_crop_and_flip = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """(images, uint8 [samples, 3, 32, 32]; labels). Raises `ConfigError`, with the place of the missing files."""
    if folder is None:
        raise ConfigError(f"CIFAR-10 needs --data DIR, with its binary files in DIR/{FOLDER}")
    rows = np.concatenate([_rows(folder / FOLDER / name) for name in FILES[split]])
    images = np.ascontiguousarray(rows[:, 1:]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(rows[:, 0].astype(np.int64))


def _rows(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ConfigError(f"no file {path}: unpack {path.name} of cifar-10-binary.tar.gz there") from error
    if not len(content) or len(content) % ROW_BYTES:
        raise ConfigError(
            f"{path} is not a file of the binary CIFAR-10: its {len(content)} bytes are not a multiple of {ROW_BYTES}; "
            "replace it"
        )
    return content.reshape(-1, ROW_BYTES)


def normalize() -> nn.Module:
    """A layer without parameters, so that the model takes images in 0…1."""
    return v2.Normalize(MEAN, DEVIATION)  # type: ignore[no-any-return]  # torchvision is not annotated


def crop_and_flip(images: Tensor) -> Tensor:
    """Each image padded by 4 and cropped at random (He et al. 2016, section 4.2), and mirrored with probability 1/2."""
    return torch.stack([_crop_and_flip(image) for image in images])
