"""Partitions of the training samples among devices; each device computes its own part from the data.

- `all`: everything.
- `iid:i/n`: the i-th (from 0) of n equal random parts.
- `dirichlet:alpha:i/n:seed`: parts of unequal size and mix of classes. The devices' shares of each class are drawn from
  a symmetric Dirichlet distribution (Hsu et al. 2019; small alpha = very unequal; the per-class draw of Yurochkin et
  al. 2019).
- `quantity:alpha:i/n:seed`: random parts of unequal size. The shares are drawn from a symmetric Dirichlet distribution
  (Li et al. 2022, quantity skew).
- `shards:k:i/n:seed`: k of the k·n equal shards of the data in the order of their classes (McMahan et al. 2017, section
  3), so that most devices have k classes.
- `natural:i`: the data of the i-th owner in the data, for example a writer.
- `by:column:i`: the rows with the i-th value of a column, in the order of the values.

The parts are disjoint and cover everything, unless there are more parts (or shards) than samples: then copies of the
data are divided, as many as give each part `draws.SAMPLES_MIN` samples on average, and a part has each of its samples
once. Where the target is a number with a fraction, its quantiles take the place
of classes (`labels.quantiles`).

A suffix splits the part further: `;test:s` is the share s that the device holds out for evaluation, `;train:s` the
rest; they are disjoint. The end of each class is held out, in the order of the data: the end of a recording, and not
windows between two on which the model is trained.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.spelling import meant
from ternbus.edge.learn import draws, labels
from ternbus.edge.learn.labels import Indices, Labels
from ternbus.edge.learn.partition_spec import Kind, Partition, PartitionError

HOLD_OUT_SAMPLES_MIN = 3
ROUNDING = 1e-9  # 0.3 · 10 is a little less than 3 in binary
SHOWN_COLUMNS: Final = 10
REMEMBERED: Final = 4  # data of tasks whose trainers are made one by one

_watching: ContextVar[list["Rows"] | None] = ContextVar("_watching", default=None)
_remembered: OrderedDict[bytes, "Rows"] = OrderedDict()


def select(spec: str, targets: npt.ArrayLike | int, owners: object = None, *, columns: object = None) -> Indices:
    """The sorted indices of the samples of the part `spec`.

    `targets` has a class or a number for each sample; more than one for each, or the number of samples alone, suits the
    partitions that need no classes. `owners` has the label of each sample's owner, of any kind, or is a table;
    `columns` is a table with a row for each sample: a structured array, a DataFrame, or a mapping of names to labels.
    Raises `ConfigError` if there is no such part. Calls with the same data share the work.
    """
    given = targets if isinstance(targets, int) else np.asarray(targets)
    key = _content(given, owners, columns)
    rows = (_remembered.pop(key, None) if key else None) or Rows(given, owners, columns)
    if key:
        _remembered[key] = rows
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return rows.of(spec)


def _content(*parts: object) -> bytes:
    """A digest of what divides rows, in arrays; empty if a part is of another kind."""
    digest = blake2b()
    for part in parts:
        if part is None or isinstance(part, int):
            digest.update(repr(part).encode())
        elif isinstance(part, np.ndarray) and not part.dtype.hasobject and part.dtype.kind != "T":
            digest.update(repr((part.dtype, part.shape)).encode())
            digest.update(np.ascontiguousarray(part).view(np.uint8).data if labels.flat(part).ndim == 1 else b"")
        else:
            return b""
    return digest.digest()


@contextmanager
def watched() -> Iterator[list["Rows"]]:
    """A list that gets the data from which the trainers that are made in this block choose their parts."""
    seen: list[Rows] = []
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """All parts of the data: the sorted rows of part i are `order[bounds[i] : bounds[i + 1]]`.

    `filled` is the number of parts that were too small and got rows of the largest. With `copies` of `samples` rows,
    row r of the division is row r % `samples` of the data.
    """

    order: Indices
    bounds: Indices
    filled: int = 0
    samples: int = 0
    copies: int = 1

    @classmethod
    def of(cls, part_of: Indices, parts: int, filled: int = 0, copies: int = 1) -> "Division":
        """The division in which row r is in part `part_of[r]`."""
        bounds = np.zeros(parts + 1, np.int64)
        np.cumsum(np.bincount(part_of, minlength=parts), out=bounds[1:])
        return cls(np.argsort(part_of, kind="stable"), bounds, filled, len(part_of) // copies, copies)

    def part(self, index: int) -> Indices:
        found = self.order[self.bounds[index] : self.bounds[index + 1]]
        return found.copy() if self.copies == 1 else np.unique(found % self.samples)


class Rows:
    """The rows of the training data, and what they can be divided by. Each division is made once.

    The arguments are those of `select`. `targets`, with the number of `samples`, and `owners` may be functions, which
    are called where a partition needs them.
    """

    def __init__(
        self,
        targets: npt.ArrayLike | Callable[[], npt.ArrayLike | None] | int,
        owners: object | Callable[[], object] = None,
        columns: object = None,
        *,
        samples: int | None = None,
    ) -> None:
        self._given_targets = targets
        self.samples = len(self._targets) if samples is None else samples
        self._owners = owners
        self._columns = columns
        self._divisions: dict[Partition, Division] = {}

    @cached_property
    def _targets(self) -> npt.NDArray[Any]:
        """The targets; without a column if there are none."""
        given: Any = self._given_targets
        found = given() if callable(given) else given
        rows = self.samples if found is None else found
        return np.empty((rows, 0)) if isinstance(rows, int) else np.asarray(rows)

    @cached_property
    def classes(self) -> Labels | None:
        """The class of each row, if each has one."""
        targets = labels.flat(self._targets)
        return Labels.of(targets) if labels.is_class(targets) else None

    @cached_property
    def bins(self) -> Labels | None:
        """The classes, or the quantiles of a number, if each row has one."""
        targets = labels.flat(self._targets)
        return labels.quantiles(targets) if labels.is_number(targets) else self.classes

    @cached_property
    def columns(self) -> dict[str, Any]:
        return {**labels.columns_of(self._given_owners), **labels.columns_of(self._columns)}

    @cached_property
    def owners(self) -> Labels | None:
        """The owner of each row, if the data have owners."""
        given: Any = self._given_owners
        if table := labels.columns_of(given):
            given = next(iter(table.values())) if len(table) == 1 else None
        return None if given is None else labels.checked(given, self.samples, "owners")

    @cached_property
    def _given_owners(self) -> object:
        return self._owners() if callable(self._owners) else self._owners

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of partition that these data allow."""
        kinds: list[Kind] = ["all", "iid", "quantity"]
        kinds += ["dirichlet", "shards"] if self.bins is not None else []
        kinds += ["natural"] if self.owners is not None else []
        return kinds + (["by"] if self.columns else [])

    def of(self, spec: str) -> Indices:
        """The sorted rows of the part `spec`. Raises `ConfigError` if there is no such part."""
        if (seen := _watching.get()) is not None and self not in seen:
            seen.append(self)
        partition = Partition.parse(spec)
        rows = self.division(partition).part(self._place(partition))
        return self._half(partition, rows) if partition.half else rows

    def labels_of(self, partition: Partition) -> Labels:
        """The labels that the partition divides by. Raises `ConfigError` if there are none."""
        found: Labels | None
        match partition.kind:
            case "natural":
                found, problem = self.owners, "these data have no owners, so no natural devices"
            case "by":
                column = self.columns.get(partition.column)
                found = (
                    None if column is None else labels.checked(column, self.samples, f"values in {partition.column}")
                )
                problem = (
                    f"there is no column {partition.column!r}{meant(partition.column, self.columns)}: {self._named}"
                )
            case _:
                found, problem = self.bins, "the data have no classes to split by, nor one number for each sample"
        if found is None:
            raise PartitionError(partition.spec, problem, self.kinds)
        return found

    @property
    def _named(self) -> str:
        """The columns in words, the first of many."""
        if not self.columns:
            return "these data have no columns"
        more = len(self.columns) - SHOWN_COLUMNS
        return f"the columns are {', '.join([*self.columns][:SHOWN_COLUMNS])}{f' and {more} more' if more > 0 else ''}"

    def division(self, partition: Partition) -> Division:
        """The parts of all devices. Raises `ConfigError` if these data cannot be divided so."""
        key = partition.whole_data
        if key not in self._divisions:
            self._divisions[key] = self._divided(partition)
        return self._divisions[key]

    def _divided(self, partition: Partition) -> Division:
        kind, parts = partition.kind, partition.parts
        if kind == "all":
            return Division(np.arange(self.samples), np.array([0, self.samples]))
        if kind in ("natural", "by"):
            found = self.labels_of(partition)
            return Division.of(found.codes, len(found.values))
        if not self.samples:
            raise PartitionError(partition.spec, "the data have no samples to divide")
        copies = draws.copies(self.samples, parts, partition.shards or 1)
        generator = draws.generator(partition.seed)
        if kind == "iid":
            return Division.of(draws.equal(generator, copies * self.samples, parts), parts, copies=copies)
        codes = np.zeros(self.samples, np.int64) if kind == "quantity" else self.labels_of(partition).codes
        codes = np.tile(codes, copies)
        if kind == "shards":
            return Division.of(draws.shards(generator, codes, parts, partition.shards), parts, copies=copies)
        part_of = draws.unequal(generator, codes, parts, partition.alpha)
        filled = draws.fill_up(generator, part_of, parts)
        return Division.of(part_of, parts, filled, copies)

    def _place(self, partition: Partition) -> int:
        """The place of a part in its division; of an owner, by its number."""
        if partition.kind not in ("natural", "by"):
            return partition.index
        found = self.labels_of(partition)
        numbers = found.numbers if partition.kind == "natural" else np.arange(len(found.values))
        place = int(np.searchsorted(numbers, partition.index))
        if place < len(numbers) and numbers[place] == partition.index:
            return place
        last = int(numbers[-1]) if len(numbers) else -1
        what = "natural devices" if partition.kind == "natural" else f"values of {partition.column}"
        gap = " (this one has no samples)" if partition.index < last else ""
        raise PartitionError(partition.spec, f"the {what} of these data are numbered 0 to {last}{gap}: choose another")

    def _half(self, partition: Partition, rows: Indices) -> Indices:
        """The held-out end of each class, or the rest. At least one row is held out, and fewer than remain."""
        if len(rows) < HOLD_OUT_SAMPLES_MIN:
            raise ConfigError(
                f"this device has {len(rows)} samples: too few to hold some out; leave out --hold-out (in a scenario "
                "local.hold_out)"
            )
        classes = self.classes if self._targets.ndim == 1 else None
        codes = np.zeros(len(rows), np.int64) if classes is None else classes.codes[rows]
        order = np.argsort(codes, kind="stable")  # class by class, each in the order of the data
        _, counts = np.unique(codes, return_counts=True)
        ends = np.cumsum(counts)
        # Cumulative over the classes, so that rounding errors do not add up.
        upto = np.floor(partition.share * ends + ROUNDING).astype(np.int64)
        upto[-1] = max(upto[-1], 1)
        held = np.zeros(len(rows), bool)
        for end, count in zip(ends, np.diff(upto, prepend=0), strict=True):
            held[order[end - count : end]] = True
        return rows[held if partition.half == "test" else ~held]
