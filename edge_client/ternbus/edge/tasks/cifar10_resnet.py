"""CIFAR-10 with a small residual network (He et al. 2016) with group norm (Wu & He 2018), which has no statistics.

The layout is that of Page's "How to Train Your ResNet" (2018, part 4): few layers, and most of the work on small
images, so that a pass takes a core half the time of a ResNet of He's layout with as many weights. The first layer
whitens the images and is not trained (part 8). The convolutions begin as identities (Jordan 2024, "94% on CIFAR-10 in
3.29 Seconds on a Single GPU", "Identity initialization").
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.edge.tasks import cifar10_data
from ternbus.edge.torch.torch_task import TorchTask

GROUPS = 8

COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # brightness, red against blue, both against green
EDGES = ((1.0, 1.0, 1.0, 1.0), (1.0, -1.0, 1.0, -1.0), (1.0, 1.0, -1.0, -1.0), (1.0, -1.0, -1.0, 1.0))  # Haar's, 2 by 2
DEVIATIONS = (3.17, 0.574, 0.626, 0.236, 0.913, 0.120, 0.132, 0.050, 0.439, 0.074, 0.074, 0.039)
"""Standard deviations of each colour's edges in the normalized training images; the small ones a little larger."""


class Whitening(nn.Module):
    """[samples, 3, 32, 32] to [samples, 24, 31, 31]: 12 filters with hardly correlated outputs, and their negatives.

    The principal components of patches of natural images are nearly edges of opponent colours. So the filters need no
    data, and only twelve deviations come from the training images.
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        colours, edges = (functional.normalize(torch.tensor(rows), dim=1) for rows in (COLOURS, EDGES))
        filters = torch.kron(colours, edges) / torch.tensor(DEVIATIONS)[:, None]
        both = torch.cat([filters, -filters]).reshape(-1, 3, 2, 2)
        self.register_buffer("filters", both, persistent=False)  # constant, so it is not sent

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.filters)


class Convolution(nn.Module):
    """A convolution, max pooling if `pool`, group norm, and SiLU."""

    def __init__(self, before: int, channels: int, *, pool: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        nn.init.dirac_(self.convolution.weight[:before])
        self.pool: nn.Module = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.silu(self.norm(self.pool(self.convolution(inputs))))


class Block(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels)
        self.second = Convolution(channels, channels)
        nn.init.zeros_(
            self.second.norm.weight
        )  # it begins as the skip connection alone (Goyal et al. 2017, section 5.1)

    def forward(self, inputs: Tensor) -> Tensor:
        sum_: Tensor = inputs + self.second(self.first(inputs))
        return sum_


class MirrorAverage(nn.Module):
    """In evaluation, the mean of the network's outputs for an image and its mirror image (part 8)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network(images)
        return outputs if self.training else (outputs + self.network(images.flip(3))) / 2


def model(width: int = 24) -> nn.Module:
    """2·`width` channels at 15 by 15 pixels, 4· at 7 by 7, 8· at 3 by 3; 0.93 million parameters by default."""
    head = nn.Linear(8 * width, cifar10_data.CLASSES)
    nn.init.zeros_(head.weight)  # the outputs of max pooling are large: the first steps would be too long
    network = nn.Sequential(
        cifar10_data.normalize(),
        Whitening(),
        nn.SiLU(),
        Convolution(2 * len(DEVIATIONS), 2 * width, pool=True),
        Block(2 * width),
        Convolution(2 * width, 4 * width, pool=True),
        Convolution(4 * width, 8 * width, pool=True),
        Block(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        head,
    )
    return MirrorAverage(network)


TASK = TorchTask(
    name="cifar10-resnet",
    model=model,
    data=cifar10_data.data,
    augment=cifar10_data.crop_and_flip,
    default_plan={
        "local_epochs": 1,
        "batch_size": 32,
        "learning_rate": 0.04,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
)
