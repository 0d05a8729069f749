"""Every dataset of the built-in tasks in its own format, made up and small: every class has a mark of its own."""

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

WRITERS = (7, 100, 23)  # numbers as QMNIST has them: not in a row, not from 0


def idx_bytes(array: npt.NDArray[np.generic]) -> bytes:
    kind = {"u1": 8, "i4": 12}[array.dtype.str[1:]]
    head = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def images(labels: npt.NDArray[np.uint8], size: int = 28) -> npt.NDArray[np.uint8]:
    """A bright bar at a height, and of a length, that the class decides."""
    made = np.random.default_rng(0).integers(0, 50, (len(labels), size, size)).astype(np.uint8)
    for image, label in zip(made, labels, strict=True):
        image[2 * (label % 10) + 2 : 2 * (label % 10) + 5, : 8 + 2 * (label // 10)] = 255
    return made


def write_mnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    for prefix, samples in (("train", 200), ("t10k", 100)):
        labels = np.arange(samples, dtype=np.uint8) % 10
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images(labels)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def write_qmnist(raw: Path) -> None:
    columns = np.zeros((200, 8), np.int32)
    columns[:, 0] = np.arange(200) % 10
    columns[:, 2] = np.array(WRITERS)[np.arange(200) % 3]
    (raw / "qmnist-train-labels-idx2-int").write_bytes(idx_bytes(columns))


def write_emnist(folder: Path) -> None:
    folder.mkdir()
    labels = np.repeat(np.arange(62, dtype=np.uint8), 5)
    turned = images(labels).transpose(0, 2, 1)
    (folder / "emnist-byclass-test-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(turned)))
    (folder / "emnist-byclass-test-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))


def write_hapt(folder: Path) -> None:
    """30 people, 10 windows of each of 6 activities; the first number of a window says where it is in the file."""
    folder.mkdir()
    subject, y = (
        np.repeat(np.arange(1, 31, dtype=np.uint8), 60),
        np.tile(np.repeat(np.arange(6, dtype=np.uint8), 10), 30),
    )
    x = np.random.default_rng(0).normal(size=(1800, 128, 6)) * 0.1
    x += np.sin(np.arange(128)[:, None] * (0.2 + 0.3 * y[:, None, None]))
    x[:, 0, 0] = np.arange(1800)
    x[:, 0, 0] %= 60
    np.savez(folder / "hapt_windows_128x6_f16.npz", x=x.astype(np.float16), y=y, subject=subject)


def write_cifar10(folder: Path) -> None:
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        labels = np.arange(20, dtype=np.uint8) % 10
        pixels = np.repeat(images(labels, 32)[:, None], 3, axis=1)
        pixels[:, 0] //= 2  # red
        rows = np.concatenate([labels[:, None], pixels.reshape(20, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def write_checkpoint(folder: Path) -> None:
    """MobileNet's, but drawn: in a folder as TORCH_HOME is one."""
    from torchvision.models import mobilenet_v3_small  # noqa: PLC0415  # heavy, and only this wants it

    from ternbus.edge.tasks.cifar10_finetune import WEIGHTS  # noqa: PLC0415  # it brings torchvision

    (folder / "hub" / "checkpoints").mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = mobilenet_v3_small().state_dict()
    torch.save(state, folder / "hub" / "checkpoints" / WEIGHTS.url.rpartition("/")[2])


class Body:
    """What sees images in place of the network that `ternbus[pretrained]` brings: drawn, and linear."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.digest = b"drawn"
        self.classifier = torch.randn(1000, 1280, generator=drawn)
        self._eye = torch.randn(3 * 32 * 32, 1280, generator=drawn)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.float().flatten(1) @ self._eye, dim=1)


def write_all(folder: Path) -> Path:
    write_mnist(folder / "FashionMNIST" / "raw")
    write_mnist(folder / "MNIST" / "raw")
    write_qmnist(folder / "MNIST" / "raw")
    write_emnist(folder / "emnist")
    write_hapt(folder / "hapt")
    write_cifar10(folder / "cifar-10-batches-bin")
    return folder
