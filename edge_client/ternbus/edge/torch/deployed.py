"""A model as a file that runs without its Python code: TorchScript (.pt), or ONNX (.onnx).

Both are made of one batch of the task's test data: a graph has what the model does with it. A branch that depends on
the values is fixed as it goes for them; the number of samples is free.
"""

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import replacing, storing
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch import objective
from ternbus.edge.torch.batches import prepared, without_targets
from ternbus.edge.torch.travelling_state import TravellingState
from ternbus.edge.torch.tree import Tree

if TYPE_CHECKING:
    from ternbus.edge.torch.torch_task import TorchTask

TORCHSCRIPT, ONNX = ".pt", ".onnx"
SAMPLES: Final = 2  # in the batch: a graph of one sample may take the 1 for a constant


def write(task: "TorchTask", tensors: Tensors, out: Path, data: Path | None) -> None:
    """Write the model with these tensors, in the form that the file's ending names.

    Raises `ConfigError` for a model that cannot be written so, and without the packages that ONNX needs.
    """
    net = task.fresh()
    state = TravellingState(net, task.stays_local)
    for name, array in state.arrays().items():
        if name not in tensors or tensors[name].shape != array.shape:
            found = tensors[name].shape if name in tensors else "missing"
            raise ConfigError(f"tensor {name!r} is {found} in the model file and {array.shape} in the task {task.name}")
    state.load(tensors)
    net.eval()
    batch = prepared(task.samples(data, "test").batch(slice(0, SAMPLES)), state.dtype, torch.device("cpu"))
    positional, named = _arguments(net, batch)
    with storing(out), replacing(out) as partial, torch.no_grad():
        try:
            if out.suffix == ONNX:
                _onnx(net, positional, named, Path(partial))
            else:
                _torchscript(net, positional, named, Path(partial))
        except (RuntimeError, TypeError, ValueError) as error:  # torch has no other class for what it cannot trace
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"the model of {task.name} cannot be written as {out.suffix}: {first}") from error


def _arguments(net: nn.Module, batch: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with, as `objective.called` does it."""
    if isinstance(batch, Mapping):
        return (), dict(objective.named_inputs(net, batch))
    return (without_targets(batch),), {}


def _torchscript(net: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and what runtimes without Python read
        example = {"example_kwarg_inputs": named} if named else {"example_inputs": positional}
        torch.jit.trace(net, **example, strict=False).save(str(out))


def _onnx(net: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Path) -> None:
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ConfigError("an ONNX file needs the packages onnx and onnxscript: pip install 'ternbus[onnx]'")
    free = torch.export.Dim.DYNAMIC

    def shapes(value: Any) -> Any:
        """The first dimension of each tensor is free."""
        if isinstance(value, torch.Tensor):
            return {0: free} if value.dim() else None
        if isinstance(value, Mapping):
            return {name: shapes(each) for name, each in value.items()}
        return type(value)(shapes(each) for each in value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages' own deprecations
        axes = shapes(named or positional)
        program = torch.onnx.export(
            net, positional, kwargs=named or None, dynamo=True, verbose=False, dynamic_shapes=axes
        )
        assert program is not None  # noqa: S101 - it is with dynamo
        program.save(str(out), external_data=False)
