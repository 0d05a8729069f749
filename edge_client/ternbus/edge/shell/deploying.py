"""`ternbus edge export` of a task and a model file: the model as TorchScript or ONNX."""

from pathlib import Path
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_safetensors
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.task_loader import load_task

DEPLOYED: Final = (".pt", ".onnx")


def deploy(task: str, out: Path, model: Path, data: Path | None) -> str:
    """Write the model with the file's tensors; what to print."""
    if out.suffix not in DEPLOYED:
        raise ConfigError(f"{out}: with --model the file ends in {' or '.join(DEPLOYED)}")
    tensors, made = load_safetensors(model), load_task(task)
    write = getattr(made, "deploy", None)
    if write is None:
        raise ConfigError(f"the task {task} has no PyTorch model: use {model} as it is")
    with explained(task):
        write(tensors, out, data=data)
    return f"{out}: {sum(tensor.size for tensor in tensors.values()):,} parameters of {model}"
