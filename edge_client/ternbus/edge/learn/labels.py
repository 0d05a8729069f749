"""The labels by which rows are divided among devices: classes, quantiles of a number, owners, a column of a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError

QUANTILES: Final = 10
"""The number of bins of a regression target, equally full where its values differ."""

ABSENT: Final = ("NAType", "NaTType")
"""Of pandas: what stands in the place of a label that is not there."""

SEVERAL: Final = (list, tuple, set, frozenset, dict, np.ndarray)
"""Of these, one is no label."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """A label for each row: `codes` [rows] are places in `values`, which are the different labels in order."""

    values: npt.NDArray[Any]
    codes: Indices

    @classmethod
    def of(cls, labels: object) -> "Labels":
        """Labels of any kind that numpy can sort; those of other kinds and of mixed kinds count as their texts."""
        found = flat(labels)
        if found.dtype.hasobject or found.dtype.kind == "T":
            found = found.astype(str)
        values, codes = np.unique(found, return_inverse=True)
        return cls(values, codes.astype(np.int64).reshape(-1))

    @property
    def counts(self) -> Indices:
        return np.bincount(self.codes, minlength=len(self.values))

    @property
    def numbered(self) -> bool:
        """Whether the labels are numbers from 0 already, perhaps with gaps."""
        return self.values.dtype.kind in "iu" and len(self.values) > 0 and int(self.values[0]) == 0

    @property
    def numbers(self) -> Indices:
        """The number of each value: of an owner, for `natural:I`."""
        return self.values.astype(np.int64) if self.numbered else np.arange(len(self.values))


def flat(labels: object) -> npt.NDArray[Any]:
    """The labels as an array of one dimension, if they are a number or a text for each row; otherwise as they are."""
    found = np.asarray(labels)
    return found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found


def is_class(targets: npt.NDArray[Any]) -> bool:
    """Whether each row has one class: a whole number, a truth value or a text."""
    return targets.ndim == 1 and (
        targets.dtype.kind in "biuUST" or (targets.dtype.hasobject and all(isinstance(one, str) for one in targets))
    )


def is_number(targets: npt.NDArray[Any]) -> bool:
    """Whether each row has one number with a fraction: the target of a regression."""
    return targets.ndim == 1 and targets.dtype.kind == "f" and len(targets) > 0


def quantiles(targets: npt.NDArray[Any]) -> Labels:
    """The bin of each number among `QUANTILES` of equal size; equal numbers are in one bin, and NaN are in the last.

    The edges are numbers of the data and nothing is interpolated, so that all machines find the same bins.
    """
    edges = np.sort(targets)[(np.arange(1, QUANTILES) * len(targets)) // QUANTILES]
    return Labels(
        values=np.array([f"q{number}" for number in range(1, QUANTILES + 1)]),
        codes=np.searchsorted(edges, targets, side="right").astype(np.int64),
    )


def columns_of(table: Any) -> dict[str, Any]:
    """The columns of a structured array, a DataFrame or a mapping, by name; empty for anything else."""
    if isinstance(table, np.ndarray):
        names: Any = table.dtype.names or ()
    else:
        names = table if isinstance(table, Mapping) else getattr(table, "columns", ())
    return {str(name): table[name] for name in names}


def single(labels: object, what: str) -> npt.NDArray[Any]:
    """The labels as an array. Raises `ConfigError`, which names them as ``what``, where a row has several values."""
    try:
        found = flat(labels)
    except ValueError:  # lists of unequal length
        found = None
    if found is None or (found.dtype.hasobject and any(isinstance(one, SEVERAL) for one in found.flat)):
        raise ConfigError(f"{what} has a list in the place of a label: give one number or text for each row")
    return found


def checked(labels: object, rows: int, what: str) -> Labels:
    """The labels of so many rows. Raises `ConfigError`, which names them as ``what``, for another number of them."""
    found = single(labels, what)
    if found.ndim != 1 or len(found) != rows:
        many = len(found) if found.ndim == 1 else f"an array of shape {found.shape} as"
        raise ConfigError(
            f"the data have {many} {what} of {rows} samples: there must be one for each row of the training data"
        )
    return Labels.of(found)


def missing(labels: object) -> int | None:
    """The first row, from 0, whose label is None, NaN or another sign of its absence; None where all are there."""
    found = flat(labels)
    if found.dtype.kind == "f":
        rows = np.isnan(found)
    elif found.dtype.kind in "mM":
        rows = np.isnat(found)
    elif found.dtype.hasobject and found.ndim == 1:
        rows = np.array([one is None or type(one).__name__ in ABSENT or bool(one != one) for one in found], bool)  # noqa: PLR0124 - as NaN
    else:
        return None
    return int(rows.argmax()) if rows.any() else None
