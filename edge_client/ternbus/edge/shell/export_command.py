"""The command `ternbus edge export`: a device's whole model, or a task's model as TorchScript or ONNX."""

from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.model_files import load_safetensors
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell.arguments import AsJson, Timeout
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.run_commands import run_device

DEPLOYED: Final = (".pt", ".onnx")


def export(
    source: Annotated[str, typer.Argument(metavar="DIR|TASK", help="Device's directory; with --model the task.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .safetensors; with --model .pt or .onnx.")],
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Model file, as `ternbus aggregator export` writes it.")
    ] = None,
    *,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --model: folder with the task's data, if it needs one.")
    ] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for use: a device's own, or with --model a task's as TorchScript (.pt) or ONNX (.onnx).

    Without --model the device fetches the newest version and writes it with the tensors that stay on it (stays_local);
    it must not run at the same time, and sends no status. With --model nothing is fetched: the model file's tensors
    are put into the task's model, which runs once on a batch of the test data. ONNX needs the extra `onnx`.

    Example: ternbus edge export pi-7 model.safetensors

    Example: ternbus edge export digits model.onnx --model model.safetensors
    """
    if model is not None:
        _deploy(source, out, model, data)
        return
    if out.suffix in DEPLOYED or data is not None:
        raise ConfigError(
            f"{out.suffix} is written of a task and a model file: ternbus edge export TASK OUT{out.suffix} --model FILE"
        )
    directory = Path(source)
    options = Options(timeout_s=timeout, out=str(out.absolute()))
    act_as_owner(directory)
    raise typer.Exit(run_device(directory, "export", options, as_json=as_json))


def _deploy(task: str, out: Path, model: Path, data: Path | None) -> None:
    if out.suffix not in DEPLOYED:
        raise ConfigError(f"{out}: with --model the file ends in {' or '.join(DEPLOYED)}")
    tensors, made = load_safetensors(model), load_task(task)
    deploy = getattr(made, "deploy", None)
    if deploy is None:
        raise ConfigError(f"the task {task} has no PyTorch model: use {model} as it is")
    with explained(task):
        deploy(tensors, out, data=data)
    typer.echo(f"{out}: {sum(tensor.size for tensor in tensors.values()):,} parameters of {model}")
