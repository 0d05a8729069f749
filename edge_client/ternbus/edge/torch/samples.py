"""The samples of a device, in whatever form `dataset()` gives them: tensors, a Dataset, or a stream.

A part of them holds numbers of samples and shares the data: devices of one process need no more memory than one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ternbus.edge.learn.failure import describe
from ternbus.edge.learn.labels import Indices
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.torch.batches import targets_of
from ternbus.edge.torch.finite import faults_of, parts_of, told
from ternbus.edge.torch.tree import Tree, converted, leaves, row_count, some_rows

CHECKED_ROWS: Final = 500  # at a time, for values that are not finite

Numbers = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]


class Samples(Protocol):
    """Samples by number, from 0."""

    def __len__(self) -> int: ...

    @property
    def at_random(self) -> bool:
        """Whether any of them can be read alone, as `dp = "sample"` needs it, each with tensors of the same shape."""
        ...

    @property
    def reads_ahead(self) -> bool:
        """Whether other processes read batches before they are asked for."""
        ...

    def labels(self) -> Labels | None:
        """The target of each sample; None where these are not single numbers."""
        ...

    def part(self, numbers: Indices) -> "Samples": ...

    def batch(self, numbers: Numbers | slice) -> Tree: ...

    def batches(self, numbers: Iterable[Numbers]) -> Iterator[Tree]:
        """A batch for each of `numbers`. A stream looks at their count alone, and begins again at its end."""
        ...

    def in_order(self, size: int) -> Iterator[Tree]:
        """All samples once, in batches of `size`; the last may be smaller."""
        ...

    def faults(self) -> str:
        """How many samples are not finite, in words; empty if none is. Of a Dataset or a stream it reads the first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSamples:
    """A tree of tensors with a row for each sample; `numbers` are those of this part, None for all."""

    tree: Tree
    numbers: Numbers | None = None

    at_random = True
    reads_ahead = False

    def __len__(self) -> int:
        return len(self.numbers) if self.numbers is not None else row_count(self.tree) or 0

    def labels(self) -> Labels | None:
        targets = targets_of(self.tree)
        if not isinstance(targets, Tensor) or targets.numel() != row_count(self.tree) or targets is self.tree:
            return None
        found = targets.reshape(-1)
        labels: Labels = (found.double() if found.is_floating_point() else found).numpy()  # numpy has no bfloat16
        return labels if self.numbers is None else labels[self.numbers]

    def part(self, numbers: Indices) -> "TensorSamples":
        return replace(self, numbers=numbers if self.numbers is None else self.numbers[numbers])

    def batch(self, numbers: Numbers | slice) -> Tree:
        """Copies of rows: a model may change its inputs in place, and an array mapped from a file may be read-only."""
        chosen = np.arange(*numbers.indices(len(self))) if isinstance(numbers, slice) else numbers
        return some_rows(self.tree, torch.from_numpy(chosen if self.numbers is None else self.numbers[chosen]))

    def batches(self, numbers: Iterable[Numbers]) -> Iterator[Tree]:
        return map(self.batch, numbers)

    def in_order(self, size: int) -> Iterator[Tree]:
        return (self.batch(slice(first, first + size)) for first in range(0, len(self), size))

    def faults(self) -> str:
        for name, part in parts_of(self.tree):
            if count := sum(self._not_finite(leaf) for leaf in leaves(part)):
                return told(name, count, str(len(self)))
        return ""

    def _not_finite(self, tensor: Tensor) -> int:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return 0
        count = 0
        for first in range(0, len(self), CHECKED_ROWS):  # needs less memory than all rows at once
            chosen = slice(first, first + CHECKED_ROWS)
            part = tensor[chosen] if self.numbers is None else tensor[torch.from_numpy(self.numbers[chosen])]
            count += int((~torch.isfinite(part)).reshape(len(part), -1).any(1).sum())
        return count


@dataclass(frozen=True, slots=True)
class _Fault:
    """What a sample's code raised, in words; it crosses from a worker process as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class _Guarded:
    """A Dataset whose faults are results: an exception of a worker would lose the line that raised it."""

    dataset: Any

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except code_errors() as error:
            return _Fault(f"sample {number} of the data cannot be read: {describe(error)}")


@dataclass(frozen=True, slots=True)
class _Collate:
    """Makes a batch of samples; a fault of one of them becomes the batch."""

    function: Any

    def __call__(self, samples: Sequence[Any]) -> Any:
        if fault := next((sample for sample in samples if isinstance(sample, _Fault)), None):
            return fault
        try:
            return self.function(samples)
        except code_errors() as error:
            hint = "; samples of different shapes need collate" if self.function is default_collate else ""
            return _Fault(f"{len(samples)} samples make no batch: {describe(error)}{hint}")


def _sound(sample: Any) -> Any:
    if isinstance(sample, _Fault):
        raise TrainingError(sample.text)
    return sample


def _made(batch: Any) -> Tree:
    """What a collate function made, in tensors."""
    return converted(_as_tensor, _sound(batch))


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(slots=True, kw_only=True)
class DatasetSamples:
    """A Dataset: any object with a length and an item for each number; it may be larger than the memory."""

    dataset: Any
    collate: Any
    workers: int
    numbers: Numbers | None = None
    _known: dict[str, Labels | None] = field(default_factory=dict)  # of all samples, shared by all parts

    at_random = False

    @property
    def reads_ahead(self) -> bool:
        return self.workers > 0

    def __len__(self) -> int:
        return len(self.dataset) if self.numbers is None else len(self.numbers)

    def labels(self) -> Labels | None:
        if "labels" not in self._known:
            self._known["labels"] = self._read_labels()
        found = self._known["labels"]
        return found if found is None or self.numbers is None else found[self.numbers]

    def _read_labels(self) -> Labels | None:
        for name in ("targets", "labels"):  # as torchvision's datasets have them
            given = np.asarray(getattr(self.dataset, name, ()))
            if given.shape == (len(self.dataset),) and given.dtype.kind in "iubf":
                return given
        guarded = _Guarded(self.dataset)
        return labels_of(_sound(guarded[number]) for number in range(len(self.dataset)))

    def part(self, numbers: Indices) -> "DatasetSamples":
        return replace(self, numbers=numbers if self.numbers is None else self.numbers[numbers])

    def batch(self, numbers: Numbers | slice) -> Tree:
        chosen = np.arange(*numbers.indices(len(self))) if isinstance(numbers, slice) else numbers
        guarded = _Guarded(self.dataset)
        return _made(_Collate(self.collate)([guarded[number] for number in self._own(chosen)]))

    def batches(self, numbers: Iterable[Numbers]) -> Iterator[Tree]:
        sampler = (self._own(chosen) for chosen in numbers)
        loader: DataLoader[Any] = DataLoader(
            _Guarded(self.dataset),  # type: ignore[arg-type]  # a Dataset is what has items
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=_Collate(self.collate),
        )
        return (_made(batch) for batch in loader)

    def in_order(self, size: int) -> Iterator[Tree]:
        return self.batches(np.arange(first, min(first + size, len(self))) for first in range(0, len(self), size))

    def faults(self) -> str:
        numbers = range(len(self)) if self.numbers is None else self.numbers
        return faults_of((self.dataset[int(number)] for number in numbers), len(self))

    def _own(self, chosen: Numbers) -> list[int]:
        return [int(number) for number in (chosen if self.numbers is None else self.numbers[chosen])]


class _Part(IterableDataset[Any]):
    """A stream whose faults are results; of a part, the samples at its places."""

    def __init__(self, stream: Any, places: Numbers | None) -> None:
        self._stream, self._places = stream, places

    def __iter__(self) -> Iterator[Any]:
        try:
            if self._places is None:
                yield from self._stream
            else:
                chosen = set(self._places.tolist())
                yield from (sample for place, sample in enumerate(self._stream) if place in chosen)
        except code_errors() as error:
            yield _Fault(f"the data cannot be read: {describe(error)}")


@dataclass(slots=True, kw_only=True)
class StreamSamples:
    """An IterableDataset: its samples come in its own order, which the plan does not shuffle.

    Each part reads the whole stream and takes the samples at its places, in one process.
    """

    stream: Any
    collate: Any
    workers: int
    count: int = 0  # of the whole stream, which is read for it where it has no length
    places: Numbers | None = None
    _known: dict[str, Labels | None] = field(default_factory=dict)  # of all samples, shared by all parts

    at_random = False
    reads_ahead = False  # the counts of batches do not reach other processes

    def __post_init__(self) -> None:
        if not self.count:
            self.count = len(self.stream) if hasattr(self.stream, "__len__") else sum(1 for _ in self._once())

    def __len__(self) -> int:
        return self.count if self.places is None else len(self.places)

    def labels(self) -> Labels | None:
        if "labels" not in self._known:
            self._known["labels"] = labels_of(self._read(None))
        found = self._known["labels"]
        return found if found is None or self.places is None else found[self.places]

    def part(self, numbers: Indices) -> "StreamSamples":
        return replace(self, places=numbers if self.places is None else self.places[numbers])

    def batch(self, numbers: Numbers | slice) -> Tree:
        count = len(range(*numbers.indices(len(self)))) if isinstance(numbers, slice) else len(numbers)
        return self._made(list(islice(self._once(), count)))

    def batches(self, numbers: Iterable[Numbers]) -> Iterator[Tree]:
        samples = self._again()
        return (self._made(list(islice(samples, len(chosen)))) for chosen in numbers)

    def in_order(self, size: int) -> Iterator[Tree]:
        samples = self._once()
        while found := list(islice(samples, size)):
            yield self._made(found)

    def faults(self) -> str:
        return faults_of(self._once(), len(self))

    def _made(self, samples: list[Any]) -> Tree:
        return _made(_Collate(self.collate)(samples))

    def _once(self) -> Iterator[Any]:
        return self._read(self.places)

    def _read(self, places: Numbers | None) -> Iterator[Any]:
        workers = self.workers if places is None else 0  # each worker has other places
        loader = DataLoader(_Part(self.stream, places), batch_size=None, num_workers=workers, collate_fn=_as_is)
        return (_sound(sample) for sample in loader)

    def _again(self) -> Iterator[Any]:
        while True:
            empty = True
            for sample in self._once():
                empty = False
                yield sample
            if empty:
                raise TrainingError("the stream of data is empty the second time: its __iter__ must begin again")


def _as_is(sample: Any) -> Any:
    return sample


def labels_of(samples: Iterable[Any]) -> Labels | None:
    """The targets of samples, where each is a single number."""
    found = []
    for sample in samples:
        target = np.asarray(targets_of(sample))
        if target.shape != () or target.dtype.kind not in "iubf":
            return None
        found.append(target.item())
    return np.asarray(found)
