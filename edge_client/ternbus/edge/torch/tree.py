"""Trees of tensors: what a batch, and what a model's outputs, may be.

A tree is a tensor, or a tuple, list, dict, named tuple, dataclass or other object with named fields, of trees. What is
none of these, such as None or a string, is left as it is.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Tree = Any


def mapped(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The tree with `function` of each tensor in its place. `tree` is not modified."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is tuple:  # the most frequent container
        return tuple([mapped(function, child) for child in tree])
    if (children := _children(tree)) is None:
        return tree
    return _rebuilt(tree, {name: mapped(function, child) for name, child in children.items()})


def leaves(tree: Tree) -> Iterator[Tensor]:
    """The tensors of the tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif type(tree) is tuple:
        for child in tree:
            yield from leaves(child)
    elif (children := _children(tree)) is not None:
        for child in children.values():
            yield from leaves(child)


def parts(tree: Tree) -> Iterator[Any]:
    """Everything in the tree that is no container, in order; nothing is copied or written."""
    if (children := _parts(tree)) is None:
        yield tree
    else:
        for child in children.values():
            yield from parts(child)


def _parts(tree: Tree) -> Mapping[Any, Tree] | None:
    whole = isinstance(tree, Tensor) or hasattr(tree, "to_numpy") or hasattr(tree, "toarray")
    return None if whole else _children(tree)


def converted(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """The tree with `function` of everything that is no container in its place."""
    if (children := _parts(tree)) is None:
        return function(tree)
    return _rebuilt(tree, {name: converted(function, child) for name, child in children.items()})


def joined(parts: Sequence[Tree]) -> Tree:
    """Batches as one: tensors are concatenated along the first dimension, those without one become a vector.

    Tensors that differ in another dimension, such as padded sequences, become a list with a tensor for each sample. Of
    anything else, the first batch's is taken.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return _concatenated(parts)
    if (children := _children(first)) is None:
        return first
    others = [_children(part) or {} for part in parts]
    return _rebuilt(first, {name: joined([other.get(name, child) for other in others]) for name, child in
                            children.items()})  # fmt: skip


def stacked(samples: Sequence[Tree]) -> Tree:
    """Samples as one batch, with a new first dimension."""
    first = samples[0]
    if isinstance(first, Tensor):
        return torch.stack(list(samples))
    if (children := _children(first)) is None:
        return first
    others = [_children(sample) or {} for sample in samples]
    return _rebuilt(first, {name: stacked([other[name] for other in others]) for name in children})


def some_rows(tree: Tree, numbers: Tensor | slice) -> Tree:
    """These rows of each tensor."""
    return mapped(lambda tensor: tensor[numbers], tree)


def row_count(tree: Tree) -> int | None:
    """The common length of all tensors' first dimension; None if there is no common one."""
    counts = {len(leaf) if leaf.dim() else -1 for leaf in leaves(tree)}
    count = counts.pop() if len(counts) == 1 else -1
    return count if count >= 0 else None


def _concatenated(parts: Sequence[Tensor]) -> Any:
    if not parts[0].dim():
        return torch.stack(list(parts))
    if len({part.shape[1:] for part in parts}) == 1:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return [sample for part in parts for sample in part]


def _children(tree: Tree) -> Mapping[Any, Tree] | None:
    """The named parts of a container; None for anything else."""
    if isinstance(tree, Mapping):
        return tree
    if isinstance(tree, tuple | list):
        return dict(enumerate(tree))
    if isinstance(tree, type | nn.Module | str | bytes | np.ndarray | np.generic | int | float) or tree is None:
        return None
    if is_dataclass(tree):
        return {field.name: getattr(tree, field.name) for field in fields(tree)}
    named = getattr(tree, "__dict__", None)
    return named if named and not callable(tree) else None


def _rebuilt(tree: Tree, children: Mapping[Any, Tree]) -> Tree:
    if isinstance(tree, tuple | list):
        values = list(children.values())
        if isinstance(tree, list):
            return values
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if type(tree) is dict:
        return dict(children)
    made = copy.copy(tree)
    for name, child in children.items():
        if isinstance(tree, Mapping):
            made[name] = child
        else:
            object.__setattr__(made, name, child)  # of a frozen dataclass too
    return made
