"""CIFAR-10 with a small residual network (He et al. 2016) with group norm (Wu & He 2018): it has no statistics.

Its layout is that of Page's "How to Train Your ResNet" (2018, part 4): few layers, and most of the work where images
are already small, so that a pass takes a core half of what a ResNet of He's layout and as many weights takes.
"""

from torch import Tensor, nn
from torch.nn import functional

from edge_client.tasks import cifar10_data
from edge_client.torch_trainer import TorchTask

GROUPS = 8


class Convolution(nn.Module):
    """A convolution, max pooling where asked for, group norm of what that leaves, and SiLU."""

    def __init__(self, before: int, channels: int, *, pool: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        self.pool: nn.Module = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.silu(self.norm(self.pool(self.convolution(inputs))))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels)
        self.second = Convolution(channels, channels)
        nn.init.zeros_(self.second.norm.weight)  # it begins as the way around alone (Goyal et al. 2017, section 5.1)

    def forward(self, inputs: Tensor) -> Tensor:
        sum_: Tensor = inputs + self.second(self.first(inputs))
        return sum_


def model(width: int = 24) -> nn.Module:
    """2·`width` channels at 16 by 16 pixels, 4· at 8 by 8, 8· at 4 by 4; 0.93 million parameters by default.

    No norm on the 32 by 32: there it would cost most.
    """
    head = nn.Linear(8 * width, cifar10_data.CLASSES)
    nn.init.zeros_(head.weight)  # what max pooling leaves is large: the first steps would go far
    return nn.Sequential(
        cifar10_data.normalize(),
        nn.Conv2d(3, width, 3, padding=1),
        nn.SiLU(),
        Convolution(width, 2 * width, pool=True),
        Block(2 * width),
        Convolution(2 * width, 4 * width, pool=True),
        Convolution(4 * width, 8 * width, pool=True),
        Block(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        head,
    )


TASK = TorchTask(
    name="cifar10-resnet",
    model=model,
    data=cifar10_data.data,
    augment=cifar10_data.crop_and_flip,
    default_plan={
        "local_epochs": 1,
        "batch_size": 32,
        "optimizer": "adamw",
        "learning_rate": 0.001,
        "beta2": 0.99,
        "weight_decay": 0.05,
    },
)
