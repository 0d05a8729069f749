"""CIFAR-10 with a frozen MobileNet V3 small, pretrained on ImageNet, and a new head that is trained.

Only the head is sent. The body is torchvision's checkpoint. Every device must have the same file in torch's folder
(`$TORCH_HOME/hub/checkpoints`); it is not downloaded.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.tasks import cifar10_data
from ternbus.edge.torch.torch_task import TorchTask

from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small  # isort: skip
from torchvision.transforms import v2  # isort: skip

WEIGHTS = MobileNet_V3_Small_Weights.IMAGENET1K_V1
FEATURES = 576
SIZE = 96  # pixels, to which the images are enlarged: at 32 the features are poor


def model() -> nn.Module:
    """A frozen body and a head of 150,282 parameters; takes [samples, 3, 32, 32] in 0…1."""
    body = mobilenet_v3_small()
    body.load_state_dict(_checkpoint())
    head = nn.Sequential(
        nn.Linear(FEATURES, 256), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(256, cifar10_data.CLASSES)
    )
    return nn.Sequential(
        v2.Resize(SIZE, antialias=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),  # ImageNet's
        body.features.requires_grad_(requires_grad=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    )


def _checkpoint() -> dict[str, Tensor]:
    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS.url.rpartition("/")[2])
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"no checkpoint {path}: download {WEIGHTS.url} there") from error
    except Exception as error:  # torch does not document its exceptions for an invalid file
        raise ConfigError(f"cannot read the checkpoint {path}: {error}; download {WEIGHTS.url} again") from error
    return state


TASK = TorchTask(
    name="cifar10-finetune",
    model=model,
    data=cifar10_data.data,
    augment=cifar10_data.crop_and_flip,
    default_plan={"local_epochs": 1, "batch_size": 64, "learning_rate": 0.03, "momentum": 0.9},
)
