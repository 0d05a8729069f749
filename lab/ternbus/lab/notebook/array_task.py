"""A task whose data are in memory: the arrays of named clients, or one table that a partition divides."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch.utils.data import ConcatDataset

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import is_device
from ternbus.edge.learn import labels
from ternbus.edge.learn.labels import Indices
from ternbus.edge.torch.forms import samples_of, table_of
from ternbus.edge.torch.samples import DatasetSamples, Samples, TensorSamples
from ternbus.edge.torch.torch_task import ARGUMENTS, Split, TorchTask
from ternbus.edge.torch.tree import joined, leaves
from ternbus.lab.notebook.parts import Parts

TASK_ARGUMENTS: Final = tuple(name for name in ARGUMENTS if name not in ("name", "data", "owners", "default_plan"))
SPLIT_SEED: Final = 0  # the same samples are tests in every run


class ArrayTask(TorchTask):
    """A `TorchTask` of samples that are read already."""

    def __init__(self, train: Samples, test: Samples, owners: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.train_samples, self.test_samples, self._labels_of_owners = train, test, owners

    def dataset(self, _: Path | None, split: Split) -> Samples:
        return self.train_samples if split == "train" else self.test_samples

    def owner(self, _: Path | None) -> Any:
        return self._labels_of_owners

    def _samples(self, given: Any) -> Samples:
        return given if isinstance(given, TensorSamples | DatasetSamples) else super()._samples(given)


@dataclass(frozen=True, slots=True)
class Testing:
    """The test data as they were given, and the arguments by which all data are read."""

    data: Any
    form: Mapping[str, Any]


class Arrays:
    """The samples of a federation: those to train on, whose they are, and those to test on.

    Raises `ConfigError` for what are no samples.
    """

    def __init__(self, train: Samples, owners: Any, testing: Testing) -> None:
        self.train, self.owners, test = train, owners, testing.data
        if test is None:
            raise ConfigError(
                "a federation is measured on test data: give test=(X, y), or test=0.2 to set a share aside"
            )
        if isinstance(test, int | float):
            self._set_aside(test)
        else:
            self.test = _finite_samples(test, "test", testing.form)

    def _set_aside(self, share: float) -> None:
        """Test on a share of each owner's samples, drawn at random; of all samples where owners are not numbered."""
        if not 0 < share < 1:
            raise ConfigError(f"test is {share:g}: the share that is set aside must be between 0 and 1")
        by_number = isinstance(self.owners, np.ndarray)
        codes = (
            labels.checked(self.owners, len(self.train), "owners").codes
            if by_number
            else np.zeros(len(self.train), np.int64)
        )
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.train))
        chosen = np.zeros(len(self.train), bool)
        for code in np.unique(codes):
            mine = order[codes[order] == code]
            chosen[mine[: min(len(mine) - 1, max(1, round(share * len(mine))))]] = True
        if not chosen.any():
            raise ConfigError("test: there are too few samples to set any aside: give test=(X, y)")
        self.test = self.train.part(np.flatnonzero(chosen))
        self.train = self.train.part(np.flatnonzero(~chosen))
        self.owners = _rows_of(self.owners, np.flatnonzero(~chosen))

    def task(self, **arguments: Any) -> ArrayTask:
        return ArrayTask(self.train, self.test, self.owners, **arguments)


def of_clients(clients: Any, testing: Testing) -> Arrays:
    """The arrays of clients by name. Raises `ConfigError` for a name that no device can have."""
    if not isinstance(clients, Mapping) or not clients:
        raise ConfigError('clients must be a dict of name to data, as {"alice": (X, y), "bob": (X, y)}')
    for name in clients:
        if not isinstance(name, str) or not is_device(name):
            raise ConfigError(
                f"the client {name!r} cannot be a device: a name has a to z, 0 to 9, - and _, begins with a letter or "
                "a number, and has at most 64 characters"
            )
    _check_columns({**{f"client {name}": given for name, given in clients.items()}, "test": testing.data})
    samples = {name: _finite_samples(given, f"client {name}", testing.form) for name, given in clients.items()}
    owners = np.repeat(np.arange(len(samples)), [len(each) for each in samples.values()])
    return Arrays(_together(samples), owners, testing)


def of_table(data: Any, owners: Any, parts: Parts, testing: Testing) -> Arrays:
    """The arrays of one table, which `parts` divides."""
    table = table_of(data) if owners is None else None
    if parts.column is not None and table is not None and parts.column in list(table.columns):
        owners = {parts.column: np.asarray(table[parts.column])}
        if not parts.keep:
            data = _without(data, parts.column)
            testing = replace(testing, data=_without(testing.data, parts.column))
    elif table is not None and parts.column is not None:  # for the message that has the columns there are
        owners = {str(name): np.asarray(table[name]) for name in table.columns}
    elif owners is not None and not labels.columns_of(owners):
        owners = labels.single(owners, "owners")
    _check_owners(owners, parts)
    _check_columns({"data": data, "test": testing.data})
    return Arrays(_finite_samples(data, "data", testing.form), owners, testing)


def _check_owners(owners: Any, parts: Parts) -> None:
    """Raise `ConfigError` for rows of nobody: they would be one device."""
    table = labels.columns_of(owners)
    name = next(iter(table)) if parts.column is None and len(table) == 1 else parts.column or ""
    what = f"the column {name!r}" if name in table else "owners"
    row = labels.missing(labels.single(table.get(name, [] if table or owners is None else owners), what))
    if row is not None:
        raise ConfigError(f"{what} has no label in row {row}: give one, or remove such rows")


def _check_columns(given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for DataFrames with other columns, or in another order: a model knows them by place."""
    tables = {name: table_of(data) for name, data in given.items()}
    columns = {name: [str(each) for each in table.columns] for name, table in tables.items() if table is not None}
    first = next(iter(columns), "")
    for name, found in columns.items():
        if found != columns[first]:
            raise ConfigError(
                f"{name} has the columns {', '.join(found)}, and {first} has {', '.join(columns[first])}: give all the "
                "same, in the same order"
            )


def _finite_samples(given: Any, what: str, form: Mapping[str, Any]) -> Samples:
    samples = samples_of(given, whose=what, **form)
    if not isinstance(samples, TensorSamples | DatasetSamples):
        raise ConfigError(f"{what}: a stream cannot be divided in memory: give arrays, or a Dataset with a length")
    if isinstance(samples, TensorSamples) and (faults := samples.faults()):  # others may take long to read
        raise ConfigError(f"{what}: {faults}: correct or remove them")
    return samples


def _together(samples: Mapping[str, Samples]) -> Samples:
    """The samples of all clients, in order."""
    if all(isinstance(each, TensorSamples) for each in samples.values()):
        trees = [each.tree for each in samples.values() if isinstance(each, TensorSamples)]
        kinds = {name: _kind(tree) for name, tree in zip(samples, trees, strict=True)}
        first = next(iter(kinds))
        for name, kind in kinds.items():
            if kind != kinds[first]:
                raise ConfigError(f"the clients' data differ: {first} has {kinds[first]}, and {name} {kind}")
        return TensorSamples(tree=joined(trees))
    datasets = [each for each in samples.values() if isinstance(each, DatasetSamples)]
    if len(datasets) < len(samples):
        raise ConfigError("the clients' data differ: some are arrays and some are Datasets; give all of one kind")
    one = datasets[0]
    return DatasetSamples(
        dataset=ConcatDataset([each.dataset for each in datasets]), collate=one.collate, workers=one.workers
    )


def _kind(tree: Any) -> str:
    """The shapes, without the rows, and the types of a client's tensors."""
    return ", ".join(f"{tuple(leaf.shape[1:])} of {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves(tree))


def _without(data: Any, column: str) -> Any:
    """The pair without a column of its inputs."""
    inputs = data[0] if isinstance(data, tuple | list) and data else None
    if inputs is None or column not in list(getattr(inputs, "columns", ())):
        return data
    return (inputs.drop(columns=[column]), *data[1:])


def _rows_of(owners: Any, rows: Indices) -> Any:
    if owners is None:
        return None
    if table := labels.columns_of(owners):
        return {name: np.asarray(column)[rows] for name, column in table.items()}
    return owners[rows]
