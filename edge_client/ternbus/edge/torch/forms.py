"""The forms of data that `dataset()` may give: tensors, arrays, a DataFrame, a Dataset, a DataLoader, a stream."""

import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    default_convert,
)

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.torch.batches import is_pair
from ternbus.edge.torch.samples import DatasetSamples, Samples, StreamSamples, TensorSamples
from ternbus.edge.torch.tree import Tree, converted, leaves, row_count

FORMS: Final = (
    "they must be (inputs, targets), or a dict, of tensors, numpy arrays or DataFrames; a Dataset; or an "
    "IterableDataset"
)
WIDER: Final = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64, np.dtype(np.uint64): np.int64}


def samples_of(given: Any, *, whose: str, collate: Any = None, workers: Any = 0) -> Samples:
    """The samples of what `dataset()` gave. Raises `ConfigError` if they are none, or of no form that is known.

    ``whose`` they are, an error says: "the task digits", or "client alice".
    """
    if type(workers) is not int or workers < 0:
        raise ConfigError(f"{whose}: workers is {workers!r}, but must be a whole number from 0")
    if isinstance(given, DataLoader):
        given, collate, workers = _of_loader(given, whose, collate, workers)
    if type(given) is TensorDataset and collate is None:  # its tensors need no reading, and serve dp = "sample" too
        given = given.tensors if len(given.tensors) > 1 else given.tensors[0]
    try:
        samples = _samples(given, whose, collate or default_collate, workers)
    except TrainingError as error:  # of a stream that was read for its length
        raise ConfigError(f"{whose}: {error}") from error
    if not len(samples):
        raise ConfigError(f"{whose}: its data are empty: there must be at least one sample")
    return samples


def _samples(given: Any, whose: str, collate: Any, workers: int) -> Samples:
    if _is_sparse(given):
        _tensor(given, whose)
    if isinstance(given, IterableDataset):
        return StreamSamples(stream=given, collate=collate, workers=workers)
    if isinstance(given, Dataset) or _is_list_of_samples(given):
        return _of_dataset(given, whose, collate, workers)
    if _is_table(given):
        raise ConfigError(
            f'{whose}: the data are one table: give (inputs, targets), as in frame.drop(columns="y"), frame["y"]'
        )
    if isinstance(given, str | bytes):  # which have a length and items, like a Dataset
        raise ConfigError(f"{whose}: the data are {type(given).__name__}, {given[:80]!r}: {FORMS}")
    container = isinstance(given, Tensor | np.ndarray | tuple | list | Mapping)
    if not container and hasattr(given, "__getitem__") and hasattr(given, "__len__"):  # as of the library datasets
        return _of_dataset(given, whose, collate, workers)
    if not container and hasattr(given, "__iter__"):
        if iter(given) is given:
            raise ConfigError(
                f"{whose}: the data are a {type(given).__name__}, which gives its samples only once: give an "
                "IterableDataset whose __iter__ begins again"
            )
        return StreamSamples(stream=given, collate=collate, workers=workers)
    if container or list(leaves(given)):
        return TensorSamples(tree=_checked(converted(lambda leaf: _tensor(leaf, whose), given), whose))
    raise ConfigError(f"{whose}: the data are {type(given).__name__}: {FORMS}")


def _of_dataset(given: Any, whose: str, collate: Any, workers: int) -> Samples:
    if not hasattr(given, "__len__"):
        raise ConfigError(f"{whose}: its Dataset has no __len__: add it, or give an IterableDataset")
    return DatasetSamples(dataset=given, collate=collate, workers=workers)


def _of_loader(loader: "DataLoader[Any]", whose: str, collate: Any, workers: int) -> tuple[Any, Any, int]:
    """Its Dataset, function and workers: the plan says which samples make a batch."""
    if not isinstance(loader.dataset, IterableDataset) and not isinstance(
        loader.sampler, RandomSampler | SequentialSampler
    ):
        raise ConfigError(
            f"{whose}: the data are a DataLoader with a {type(loader.sampler).__name__}, but the plan "
            "chooses the samples of a batch: give its Dataset"
        )
    if loader.batch_sampler is not None and loader.batch_size is None:  # else PyTorch made it
        raise ConfigError(
            f"{whose}: the data are a DataLoader with a batch_sampler, but the plan chooses the samples of a batch: "
            "give its Dataset, and its collate_fn as the task's collate"
        )
    if loader.batch_size is None and loader.collate_fn is not default_convert:
        raise ConfigError(
            f"{whose}: the data are a DataLoader with batch_size=None, whose collate_fn would get single samples: give "
            "its Dataset, and the task a collate that makes a batch of a list of samples"
        )
    own = None if loader.batch_size is None or loader.collate_fn is default_collate else loader.collate_fn
    return loader.dataset, collate or own, workers or loader.num_workers


def _is_list_of_samples(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and isinstance(given[0], tuple | Mapping)


def _is_table(given: Any) -> bool:
    """Whether it is a DataFrame, of pandas or one like it, which is not imported for this."""
    return hasattr(given, "to_numpy") and hasattr(given, "columns")


def table_of(given: Any) -> Any:
    """The table among the inputs and targets, for `--partition by:COLUMN:I`; None where there is none."""
    return next((part for part in given if _is_table(part)), None) if isinstance(given, tuple | list) else None


def _tensor(leaf: Any, whose: str) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if _is_table(leaf):
        columns = [_column(np.asarray(leaf[name]), f"the column {name!r}", whose) for name in leaf.columns]
        return torch.from_numpy(np.stack(columns, 1, dtype=np.float32, casting="unsafe")) if columns else leaf
    if isinstance(leaf, np.ndarray) or hasattr(leaf, "to_numpy"):
        array = leaf if isinstance(leaf, np.ndarray) else leaf.to_numpy()
        return _shared(_column(array, "an array", whose))
    if isinstance(leaf, int | float | str | bytes | np.generic) or leaf is None:
        raise ConfigError(
            f"{whose}: the data have {type(leaf).__name__} in place of a tensor: {FORMS}; of samples of "
            "different lengths, give a Dataset and collate"
        )
    if _is_sparse(leaf):
        kind = type(leaf).__name__
        raise ConfigError(f"{whose}: the data have a sparse matrix, a {kind}: convert it, as by .toarray()")
    raise ConfigError(f"{whose}: the data are {type(leaf).__name__}: {FORMS}")


def _is_sparse(given: Any) -> bool:
    """Whether it is a matrix or an array of scipy.sparse, which is not imported for this."""
    return hasattr(given, "toarray") and hasattr(given, "nnz")


def _column(array: Any, what: str, whose: str) -> Any:
    if array.dtype.kind not in "biufc":
        raise ConfigError(
            f"{whose}: {what} of the data is of the type {array.dtype}: it must hold numbers; number its "
            "categories, for example by numpy.unique(…, return_inverse=True)"
        )
    if np.ma.is_masked(array):
        raise ConfigError(
            f"{whose}: {what} of the data has masked values, which no tensor has: fill them, as in array.filled(0), or "
            "remove their samples"
        )
    return array


def _shared(array: Any) -> Tensor:
    """A tensor in the memory of the array, where torch can use it."""
    array = array.astype(WIDER.get(array.dtype, array.dtype.newbyteorder("=")), copy=False)
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(array)


def _checked(tree: Tree, whose: str) -> Tree:
    """The tree, if all of its tensors have one number of rows, at least one. Raises `ConfigError` otherwise."""
    found = list(leaves(tree))
    if not found:
        raise ConfigError(f"{whose}: the data have no tensor: {FORMS}")
    if row_count(tree):
        return tree
    if is_pair(tree) and all(isinstance(part, Tensor) and part.dim() for part in tree):
        raise ConfigError(
            f"{whose} has {len(tree[0])} inputs and {len(tree[1])} targets in this part: "
            "it must have equal numbers, and at least one"
        )
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in found[:5])
    raise ConfigError(
        f"{whose}: the data are tensors of shapes {shapes}: each must have a row for each sample; for "
        "samples of different lengths give a Dataset and collate"
    )
