"""The loss of a batch: the task's own function of outputs and targets, or of model and batch."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.autotune import Way
from ternbus.edge.torch.batches import inputs_of, is_pair, target_key, without_targets
from ternbus.edge.torch.tree import Tree, leaves, mapped

if TYPE_CHECKING:
    from ternbus.edge.torch.torch_task import TorchTask

GENERAL_ARGUMENTS: Final = 3  # net, batch, plan
NO_FLOATS: Final = "result type Float can't be cast"  # as BCEWithLogitsLoss says of whole numbers
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a batch, and the model's outputs if they are known."""

    value: Any
    outputs: Tree | None = None


def is_general(loss: Callable[..., Any]) -> bool:
    """Whether it takes (net, batch, plan), and not (outputs, targets)."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # of a function without a signature, such as a compiled one
        return False
    needed = [each for each in parameters if each.default is each.empty and each.kind in _POSITIONAL]
    return len(needed) == GENERAL_ARGUMENTS


class Objective:
    """The loss of a task's batches, whichever form of `loss` it has."""

    def __init__(self, task: "TorchTask") -> None:
        self._task = task
        self._own = task.has_own("loss")
        self.general = self._own and is_general(task.loss)

    def of(self, net: nn.Module, batch: Tree, plan: Plan, way: Way) -> Loss:
        """The loss and, if they are known, the outputs of a batch."""
        task = self._task
        if self.general:
            with way.autocast():
                return read(task.loss(net, way.laid_out(batch), plan))
        with way.autocast():
            outputs = task.predict(net, way.laid_out(batch))
        if way.bfloat16:
            outputs = mapped(_as_float32, outputs)
        return Loss(self.simple(outputs, task.targets(batch)), outputs)

    def simple(self, outputs: Tree, targets: Tree) -> Any:
        """The loss of outputs and targets; without one, the outputs' own, or cross entropy."""
        if self._own:
            loss: Callable[..., Any] = self._task.loss
            try:
                return loss(outputs, targets)
            except RuntimeError as error:
                if NO_FLOATS in str(error):  # PyTorch names the types, but not what they are of
                    hint = 'targets are whole numbers: for a loss that takes none, convert them by .astype("float32")'
                    error.args = (f"{error}; {hint}",)
                raise
        return default_loss(outputs, targets)

    def of_classes(self, outputs: Tree, targets: Tree) -> bool:
        """Whether it is cross entropy, one class for each row of scores."""
        return not self._own and all(
            isinstance(each, Tensor) and each.dim() == dimensions and each.is_floating_point() == scores
            for each, dimensions, scores in ((outputs, 2, True), (targets, 1, False))
        )

    def outputs(self, net: nn.Module, batch: Tree, found: Loss) -> Tree | None:
        """The outputs for metrics; None if the loss gives none, and the task does not say how to predict."""
        if found.outputs is None and (self._task.has_own("predict") or self._task.has_own_metrics):
            return self._task.predict(net, batch)
        return found.outputs


def called(net: nn.Module, batch: Tree) -> Tree:
    """The model's outputs: a pair's inputs are its one argument, a dict's entries its named ones.

    The targets among these are left out where the model does not take them.
    """
    if getattr(net.forward, "__name__", "") == "_forward_unimplemented":
        raise ConfigError(
            f"the model is a {type(net).__name__}, which has no forward(): give the task predict(net, batch), and for "
            "several networks loss(net, batch, plan)"
        )
    if isinstance(batch, tuple | list) and not is_pair(batch):
        raise ConfigError(
            f"the data have {len(batch)} parts: nest them as (inputs, targets), or give the task its own "
            "loss(net, batch, plan) and predict(net, batch)"
        )
    named = isinstance(batch, Mapping)
    try:
        return net(**named_inputs(net, batch)) if named else net(inputs_of(batch))
    except RuntimeError as error:
        # PyTorch names the types, but not what they are of
        is_of_type = "type" in str(error) or "not implemented for" in str(error)
        if is_of_type and not all(map(torch.is_floating_point, leaves(without_targets(batch)))):
            hint = 'inputs are whole numbers: for a model that takes none, convert them by .astype("float32")'
            error.args = (f"{error}; {hint}",)
        raise


def named_inputs(net: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of a dict that the model is called with."""
    named: Mapping[str, Any] = batch if _takes(net.forward, target_key(batch)) else without_targets(batch)
    return named


def _takes(forward: Callable[..., Any], name: str | None) -> bool:
    """Whether it has such an argument, as far as is known."""
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def default_loss(outputs: Tree, targets: Tree) -> Any:
    """The loss in the model's outputs; without one, cross entropy of the scores of classes in them.

    Raises `ConfigError` if they are none, or if the targets are no classes.
    """
    if (own := loss_in(outputs)) is not None:
        return own
    scores = scores_of(outputs)
    if not isinstance(scores, Tensor) or not isinstance(targets, Tensor):
        what = "the model returns" if isinstance(targets, Tensor) else "the targets are"
        kind = type(outputs if isinstance(targets, Tensor) else targets).__name__
        raise ConfigError(f"{what} {kind}, which cross entropy does not take: give the task a loss(outputs, targets)")
    _check_classes(targets, scores)
    try:
        return functional.cross_entropy(scores, targets)
    except IndexError as error:  # PyTorch names the target, but not what there is
        if scores.ndim < 2:
            raise
        raise IndexError(f"{error} The model has outputs for the classes 0 to {scores.shape[1] - 1}") from error


def _check_classes(targets: Tensor, scores: Tensor) -> None:
    """Raise `ConfigError` for targets that cross entropy does not take, though a user often has them."""
    if targets.is_floating_point() and not _are_shares(targets, scores):
        if bool((targets == targets.round()).all()) and targets.numel() == targets.shape[0]:  # classes in a table
            raise ConfigError(
                f"the targets are {targets.dtype}, and cross entropy needs the numbers of classes: convert them, as in "
                "y.astype(int), or give the task a loss, such as nn.MSELoss()"
            )
        raise ConfigError(
            "the targets are numbers with a fraction, and cross entropy needs classes: give the task a loss, such as "
            "nn.MSELoss(), or nn.BCEWithLogitsLoss() for several labels"
        )
    if targets.dim() == scores.dim() == 2 and targets.shape[1] == 1:
        raise ConfigError(
            f"the targets have shape {tuple(targets.shape)}, and cross entropy needs one class for each sample: "
            "flatten them, as in y.ravel()"
        )
    if targets.dtype == torch.bool:
        raise ConfigError(
            "the targets are True and False, and cross entropy needs the numbers of classes: convert them, as in "
            'y.astype(int), or give the task a loss, such as nn.BCEWithLogitsLoss(), and y.astype("float32")'
        )
    if targets.dim() > 1 and targets.shape == scores.shape and not targets.is_floating_point():
        raise ConfigError(
            f"the targets have shape {tuple(targets.shape)}, a number for each class, and cross entropy needs one "
            "class for each sample: convert them, as in y.argmax(1), or for several labels give the task a loss, "
            'such as nn.BCEWithLogitsLoss(), and y.astype("float32")'
        )


def _are_shares(targets: Tensor, scores: Tensor) -> bool:
    """Whether they are a probability of each class."""
    if targets.shape != scores.shape or targets.dim() < 2:
        return False
    total = targets.sum(1)
    return bool((targets >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-2)


def loss_in(outputs: Tree) -> Any:
    """The loss in a model's outputs; None without one."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return None if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)


def scores_of(outputs: Tree) -> Any:
    """The `logits` in a model's outputs, or else the outputs."""
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)


def read(result: Any) -> Loss:
    """What a loss of (net, batch, plan) returned: the loss, (loss, outputs), or outputs with a loss in them."""
    if isinstance(result, tuple) and len(result) == 2 and not hasattr(result, "_fields"):
        return Loss(*result)
    own = loss_in(result)
    return Loss(result) if own is None else Loss(own, result)


def trainable(value: Any) -> Tensor:
    """The loss, if it is one number that gradients can be computed of. Raises `TrainingError` otherwise."""
    if not isinstance(value, Tensor):
        raise TrainingError(
            f"loss() returned {type(value).__name__}: in training it must return a tensor, from which gradients follow"
        )
    if value.numel() != 1:
        raise TrainingError(f"loss() returned a tensor of shape {tuple(value.shape)}: it must return the batch's mean")
    if not value.requires_grad:
        raise TrainingError(
            "loss() returned a tensor that does not depend on the model's parameters: is something detached, "
            "or under torch.no_grad()?"
        )
    return value.reshape(()) if value.dim() else value


def number(value: Any, what: str) -> float:
    """One number of a tensor, a numpy array or a Python number. Raises `ConfigError` for anything else."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = tuple(getattr(value, "shape", ()))
        kind = f"{type(value).__name__}{f' of shape {shape}' if shape else ''}"
        raise ConfigError(f"{what} returned {kind}: it must return one number") from error


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
