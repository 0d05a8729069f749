"""The classes of a device's data, for its owner's or the lab's report."""

from collections.abc import Mapping
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.messages import CLASSES_MAX, SAMPLES_MAX
from ternbus.edge.learn.task import Trainer

NAMES_BYTES: Final = 8192  # of all classes: half of what a header may have


@runtime_checkable
class CountingTrainer(Protocol):
    """A trainer that knows the classes of its data; optional beside `Trainer`."""

    @property
    def class_counts(self) -> Mapping[str, int]:
        """The number of samples of each class, by the class's name or number."""
        ...


def class_counts_of(trainer: Trainer) -> dict[str, int]:
    """The samples of each class of a trainer's data; empty where it does not know, or has more than are reported.

    Raises `ConfigError` for what is no number of samples.
    """
    counts = trainer.class_counts if isinstance(trainer, CountingTrainer) else {}
    for name, count in counts.items():
        if not 0 <= count <= SAMPLES_MAX:
            raise ConfigError(
                f"class_counts has {count} samples of the class {name}: it must be from 0 to {SAMPLES_MAX}"
            )
    found = {str(name): int(count) for name, count in counts.items()}
    fits = len(found) <= CLASSES_MAX and sum(len(name.encode("utf-8", "replace")) for name in found) <= NAMES_BYTES
    return found if fits else {}


def counted(labels: npt.NDArray[np.integer]) -> dict[str, int]:
    """The number of samples of each class, for `class_counts`; ``labels`` has one for each sample."""
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(map(str, classes.tolist()), counts.tolist(), strict=True))
