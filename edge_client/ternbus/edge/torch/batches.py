"""What a batch holds: its inputs and its targets, as the model takes them.

A batch is what `dataset()` gives, with several samples:

a pair                  (inputs, targets), each of them any tree
a dict                  the targets under one of `TARGETS`; the inputs are the other entries
one tensor              both, as for an autoencoder
anything else           the inputs; the task's own `loss` knows what is in it
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ternbus.edge.torch.tree import Tree, mapped

TARGETS: Final = ("labels", "label", "targets", "target", "y")


def is_pair(batch: Tree) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2


def target_key(batch: Tree) -> Any:
    """The key of a dict's targets; None if it has none, or is no dict."""
    if not isinstance(batch, Mapping):
        return None
    return next((name for name in TARGETS if name in batch), None)


def inputs_of(batch: Tree) -> Tree:
    """What a model may see of a batch: of a dict all of it, since a model may take its targets."""
    return batch[0] if is_pair(batch) else batch


def without_targets(batch: Tree) -> Tree:
    """The inputs alone, also of a dict."""
    key = target_key(batch)
    return inputs_of(batch) if key is None else {name: each for name, each in batch.items() if name != key}


def targets_of(batch: Tree) -> Tree:
    """The targets of a batch; None if nothing tells which they are."""
    if is_pair(batch):
        return batch[1]
    if (key := target_key(batch)) is not None:
        return batch[key]
    return batch if isinstance(batch, Tensor) else None


def with_inputs(batch: Tree, inputs: Tree) -> Tree:
    """The batch with other inputs, and its own targets unless these are among the inputs."""
    if is_pair(batch):
        return _pair_like(batch, inputs, batch[1])
    key = target_key(batch)
    return inputs if key is None else {key: batch[key], **inputs}


def _pair_like(batch: Tree, inputs: Tree, targets: Tree) -> Tree:
    return type(batch)(inputs, targets) if hasattr(batch, "_fields") else (inputs, targets)


def prepared(batch: Tree, dtype: torch.dtype | None, device: torch.device) -> Tree:
    """The batch as the model takes it: on its device, and numbers with a point in its dtype.

    Inputs of uint8 (images) become floats in 0…1; whole numbers as targets become int64, which losses of classes need.
    """

    def as_input(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            tensor = tensor.to(device).float() / 255
        if tensor.is_floating_point() and dtype is not None:
            return tensor.to(device, dtype)
        return tensor.to(device)

    def as_target(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64 and dtype == torch.float32:
            return tensor.to(device, dtype)
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        return tensor.to(device, torch.int64) if whole else tensor.to(device)

    if is_pair(batch):
        return _pair_like(batch, mapped(as_input, batch[0]), mapped(as_target, batch[1]))
    if (key := target_key(batch)) is None:
        return mapped(as_input, batch)
    return {**mapped(as_input, without_targets(batch)), key: mapped(as_target, batch[key])}
