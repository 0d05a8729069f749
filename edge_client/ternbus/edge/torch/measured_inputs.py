"""The inputs of a PyTorch task's samples, as its model takes them, for federated statistics."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy.typing as npt
import torch

from ternbus.broker.errors import ConfigError
from ternbus.edge.torch.batches import prepared, without_targets
from ternbus.edge.torch.samples import Samples
from ternbus.edge.torch.torch_task import TorchTask
from ternbus.edge.torch.tree import leaves

ROWS: Final = 32  # that are read together: an image may be large


class MeasuredInputs:
    """What a trainer with a task and samples offers of `ternbus.edge.learn.measure.MeasuredTrainer`."""

    _task: TorchTask
    _samples: Samples

    @property
    def feature_names(self) -> Sequence[str]:
        return tuple(getattr(self._task, "feature_names", ()))

    @property
    def feature_axis(self) -> int:
        return int(getattr(self._task, "feature_axis", 1))

    @property
    def inputs_at_random(self) -> bool:
        """Whether one sample that cannot be read does not keep the others from being read."""
        return self._samples.at_random

    def measured_inputs(self) -> Iterator[npt.NDArray[Any]]:
        """The inputs as the model takes them. Raises `ConfigError` for others than one tensor of floats."""
        for batch in self._samples.in_order(ROWS):
            found = list(leaves(without_targets(prepared(batch, torch.float32, torch.device("cpu")))))
            if len(found) != 1 or not found[0].is_floating_point():
                raise ConfigError(
                    f"the inputs of the task {self._task.name} are not one tensor of numbers with a point"
                )
            yield found[0].numpy()
