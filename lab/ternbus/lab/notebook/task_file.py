"""The file of a task for real devices, from a federation in a notebook; and its arrays, if they are asked for.

A device has its data as FOLDER/train.npz, with the arrays `inputs` and `targets`, and an evaluator FOLDER/test.npz.
Functions that a module defines are imported; that module must then be on each device, too. Those of the notebook are
written to the file, with the names that they need.
"""

import pprint
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import fault, write_text
from ternbus.broker.own_code import is_own
from ternbus.edge.learn.metric import Metric
from ternbus.edge.learn.task_folder import taken_by
from ternbus.edge.torch.batches import is_pair
from ternbus.edge.torch.samples import TensorSamples
from ternbus.lab.notebook.array_task import ArrayTask
from ternbus.lab.notebook.objectives import LOSSES, SHAPED, predicted
from ternbus.lab.notebook.source_code import Source

if TYPE_CHECKING:
    from ternbus.lab.notebook.federation import Federation

TITLE: Final = '"""A task for Ternbus, written by Federation.to_task:'
DATA: Final = '''\
def data(folder, split):
    """The samples of `split`, "train" or "test", of one device: a row each."""
    if folder is None:
        raise ConfigError("name the folder of train.npz or test.npz with --data")
    with np.load(folder / f"{split}.npz") as file:
        return torch.from_numpy(file["inputs"]), torch.from_numpy(file["targets"])
'''
LOSS: Final = """\
def loss(outputs, targets):
    return functional.{name}(outputs, targets.to(outputs.dtype))
"""
PREDICT: Final = """\
def predict(net, batch):
    outputs = net(batch[0])
    return outputs.squeeze(-1) if outputs.shape == (*batch[1].shape, 1) else outputs
"""
WRITTEN: Final = ("loss", "default_plan")


def write(fed: "Federation", path: Path, data: Path | None) -> Path:
    """Write the task, and with `data` the arrays of each device as `data`/NAME/train.npz and test.npz.

    Raises `ConfigError` for what has no source, for a file that this function has not written or cannot write, and for
    data that are no pair of arrays; `StorageError` for a disk that is full.
    """
    task = fed.task
    if not isinstance(task, ArrayTask):
        raise ConfigError(f"to_task: the federation is of the task {task.name} already: name it with --task")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(f"to_task: {path.name} is no name of a module: write one such as my_task.py")
    taken = taken_by(path.resolve().parent, path.stem)
    if path.stem in sys.stdlib_module_names or (taken and not is_own(taken)):
        raise ConfigError(f"to_task: {path.stem} is another module, found in place of the file: write my_task.py")
    if path.exists() and not path.read_text(encoding="utf-8").startswith(TITLE):
        raise ConfigError(f"to_task: {path} is a file of yours: choose another name, or remove it")
    pairs = {split: _pair(samples) for split, samples in (("train", task.train_samples), ("test", task.test_samples))}
    text = text_of(fed, task, path.stem)
    try:
        write_text(path, text)
        if data is not None:
            for number, name in enumerate(fed.devices):
                _save(fed, number, data / name, pairs["test"])
    except OSError as error:
        raise fault(error, Path(error.filename or path), "to_task: cannot write ") from error
    return path


def text_of(fed: "Federation", task: ArrayTask, module: str) -> str:
    """The text of the file."""
    source = Source(
        imports=dict.fromkeys(["import numpy as np", "import torch", "from ternbus.edge import ConfigError, TorchTask"])
    )
    arguments = {"name": repr(task.name), "model": source.function(vars(task)["model"], "model"), "data": "data"}
    definitions = [DATA]
    if isinstance(fed.loss, str):
        if fed.loss in SHAPED:
            source.imports["from torch.nn import functional"] = None
            definitions.append(LOSS.format(name=LOSSES[fed.loss].__name__))
            arguments["loss"] = "loss"
    elif fed.loss is not None:
        arguments["loss"] = _loss(fed.loss, source)
    if vars(task).get("predict") is predicted:
        definitions.append(PREDICT)
        arguments["predict"] = "predict"
    if task.metrics is not None:
        arguments["metrics"] = _metrics(task.metrics, source)
    if task.default_plan:
        arguments["default_plan"] = pprint.pformat(dict(task.default_plan), width=100)
    for name, value in vars(task).items():
        if name in arguments or name in WRITTEN or name.startswith("_") or name.endswith("_samples"):
            continue
        arguments[name] = source.function(value, name) if callable(value) else repr(value)
    body = "\n\n\n".join(text.rstrip() for text in (*source.definitions.values(), *definitions))
    lines = "\n".join(f"    {name}={value}," for name, value in arguments.items())
    imports = "\n".join([*sorted(each for each in source.imports if each.startswith("import ")),
                         *sorted(each for each in source.imports if each.startswith("from "))])  # fmt: skip
    title = f'{TITLE} ternbus edge check {module}:TASK --data FOLDER."""'
    return f"{title}\n\n{imports}\n\n\n{body}\n\n\nTASK = TorchTask(\n{lines}\n)\n"


def _loss(loss: Any, source: Source) -> str:
    """A loss as it is written. Raises `ConfigError` for a module with settings that its text does not tell."""
    if not isinstance(loss, nn.Module):
        return source.function(loss, "loss")
    kind = type(loss)
    usual = kind() if kind.__module__.startswith("torch.nn.") else None
    same = usual is not None and all(vars(usual).get(name) == value for name, value in vars(loss).items())
    if not same or list(loss.buffers()):
        raise ConfigError(f"to_task: the loss {loss!r} has settings of its own: write it as a function")
    source.imports["from torch import nn"] = None
    return f"nn.{kind.__name__}()"


def _metrics(metrics: Any, source: Source) -> str:
    given = metrics() if callable(metrics) else metrics
    parts = []
    for name, metric in given.items():
        if isinstance(metric, Metric):
            source.imports[f"from ternbus.edge import {metric.better}"] = None
            parts.append(f"{name!r}: {metric.better}({source.function(metric.compute, _word(name))})")
        else:
            parts.append(f"{name!r}: {source.function(metric, _word(name))}")
    return f"{{{', '.join(parts)}}}"


def _word(name: str) -> str:
    """The metric's name as that of a function."""
    return name if name.isidentifier() else "metric_" + "".join(each if each.isalnum() else "_" for each in name)


def _pair(samples: Any) -> tuple[Tensor, Tensor]:
    if isinstance(samples, TensorSamples):
        batch = samples.batch(slice(None))
        if is_pair(batch) and all(isinstance(part, Tensor) for part in batch):
            return batch[0], batch[1]
    raise ConfigError(
        "to_task: the data are no pair of arrays, (X, y), which a file of arrays could hold: write a task with "
        "data(folder, split) yourself, as docs/tasks.md has it"
    )


def _save(fed: "Federation", number: int, folder: Path, test: tuple[Tensor, Tensor]) -> None:
    trainer: Any = fed.trainer(number)
    folder.mkdir(parents=True, exist_ok=True)
    for split, (inputs, targets) in (("train", _pair(trainer.data)), ("test", test)):
        np.savez(folder / f"{split}.npz", inputs=inputs.numpy(), targets=targets.numpy())
