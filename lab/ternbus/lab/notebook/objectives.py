"""Losses by name, and the metrics that go with them."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.broker.spelling import meant
from ternbus.edge.learn.metric import Metric, higher, lower
from ternbus.edge.torch.batches import is_pair
from ternbus.edge.torch.objective import called
from ternbus.edge.torch.tree import Tree

Function = Callable[[Any, Any], Any]


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean absolute error, in the targets' unit."""
    return (outputs - targets).abs().mean()


def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """The coefficient of determination: 1 is perfect, 0 no better than the targets' mean."""
    wanted = targets if targets.is_floating_point() else targets.to(outputs.dtype)  # whole numbers have no mean
    return 1 - ((outputs - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()


def accuracy_of_signs(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of logits with the sign of their target, 0 or 1."""
    return ((outputs > 0) == (targets > 0.5)).float().mean()


REGRESSION: Final[Mapping[str, Function]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}
LOSSES: Final[Mapping[str, Function]] = {
    **REGRESSION,
    "cross_entropy": functional.cross_entropy,
    "bce": functional.binary_cross_entropy_with_logits,
}
SHAPED: Final = (*REGRESSION, "bce")  # of outputs and targets of one shape


def loss_named(name: str) -> Function:
    """The loss of this name. Raises `ConfigError` if there is none."""
    if name not in LOSSES:
        raise ConfigError(
            f"there is no loss {name!r}{meant(name, LOSSES)}: choose one of {', '.join(LOSSES)}, or give a function of "
            "(outputs, targets)"
        )
    return LOSSES[name]


def predicted(net: nn.Module, batch: Tree) -> Tree:
    """The model's outputs: [samples, 1] as [samples] where the targets are, which else would broadcast."""
    outputs = called(net, batch)
    if is_pair(batch) and isinstance(outputs, Tensor) and isinstance(batch[1], Tensor):
        return outputs.squeeze(-1) if outputs.shape == (*batch[1].shape, 1) else outputs
    return outputs


def shaped(function: Function) -> Function:
    """The loss of float targets, which may be whole numbers in the data."""

    def loss(outputs: Any, targets: Any) -> Any:
        if outputs.shape != targets.shape:
            raise ConfigError(
                f"the model's outputs have shape {tuple(outputs.shape)} and the targets {tuple(targets.shape)}: "
                "this loss needs equal shapes"
            )
        return function(outputs, targets if targets.is_floating_point() else targets.to(outputs.dtype))

    return loss


def metrics_of(loss: str) -> dict[str, Metric] | None:
    """The metrics that go with a named loss; None: the task's own, accuracy."""
    if loss in REGRESSION:
        return {"mae": lower(mae), "r2": higher(r2)}
    return {"accuracy": higher(accuracy_of_signs)} if loss == "bce" else None


def arguments_of(loss: Any, metrics: Any) -> dict[str, Any]:
    """The arguments of `TorchTask` for a loss by name, as a module or a function, and for metrics."""
    found: dict[str, Any] = {} if metrics is None else {"metrics": metrics}
    if loss is None:
        return found
    if not isinstance(loss, str):
        return found | {"loss": loss}
    own = loss_named(loss)
    if metrics is None and (usual := metrics_of(loss)) is not None:
        found["metrics"] = usual
    if loss in SHAPED:
        return found | {"loss": shaped(own), "predict": predicted}
    return found | {"loss": own}
