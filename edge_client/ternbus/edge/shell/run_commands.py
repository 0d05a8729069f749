"""The commands of `ternbus edge` that become a device's process: train, evaluate.

They import neither numpy nor the core; the process does that replaces this one. So a device starts sooner.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.log_option import LogFormat, LogOption
from ternbus.edge.shell.arguments import AsJson, Dir, FineTune, Reports, Stay, Timeout
from ternbus.edge.shell.options import Options

if TYPE_CHECKING:
    from ternbus.edge.core.profile import Role

app = typer.Typer(rich_markup_mode=None)

Versions = Annotated[int | None, typer.Option(min=1, help="Number of accepted updates before stopping.")]
Evaluated = Annotated[int | None, typer.Option(min=1, help="Number of versions to evaluate before stopping.")]


def run_device(folder: Path, role: "Role", options: Options, *, as_json: bool) -> int:
    """Run the device: in a fresh interpreter with the same process id, or here if torch is loaded already."""
    request = {"folder": str(folder), "role": role, "options": asdict(options), "as_json": as_json}
    if "torch" not in sys.modules:
        sys.stdout.flush()
        command = [sys.executable, "-P", "-m", "ternbus.edge.shell", json.dumps(request)]
        os.execv(sys.executable, command)  # noqa: S606 - ourselves, without a shell
    from ternbus.edge.shell import process  # noqa: PLC0415 - with numpy and the core, which the commands do without

    return process.run(request)


@app.command()
def run(
    directory: Dir,
    *,
    versions: Versions = None,
    timeout: Timeout = None,
    min_seconds: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Shortest duration of a training, to imitate a slow device."),
    ] = 0.0,
    reports: Reports = False,
    fine_tune: FineTune = 0.0,
    stay: Stay = False,
    as_json: AsJson = False,
    log: LogOption = LogFormat.TEXT,
) -> None:
    """Train until the federation closes, or until Ctrl-C, SIGTERM or SIGHUP; unacknowledged updates are kept in DIR.

    `--versions N` stops after N accepted updates. `--report-metrics` and `--fine-tune EPOCHS` need held-out
    data: join with `--hold-out 0.2`. A fine-tuned model stays on the device; `--report-metrics` sends its metrics.

    A training that fails does not end the device: it says why, to the aggregator too, and tries again ever later.

    Exit codes: 0 done, 1 timeout or a fault of disk or network, 2 invalid configuration or a corrupt store, 3 refused
    or revoked by the aggregator, 4 privacy budget spent.

    Example: ternbus edge run pi-7
    """
    options = Options(
        versions=versions, timeout_s=timeout, min_seconds=min_seconds, reports=reports, fine_tune=fine_tune, stays=stay
    )
    act_as_owner(directory)
    raise typer.Exit(run_device(directory, "train", options, as_json=as_json or log == LogFormat.JSON))


@app.command()
def evaluate(
    directory: Dir,
    *,
    versions: Evaluated = None,
    timeout: Timeout = None,
    stay: Stay = False,
    as_json: AsJson = False,
    log: LogOption = LogFormat.TEXT,
) -> None:
    """Follow the model, evaluate its newest version on the task's test data, and publish the metrics.

    Example: ternbus edge evaluate evaluator-1
    """
    options = Options(versions=versions, timeout_s=timeout, stays=stay)
    act_as_owner(directory)
    as_json = as_json or log == LogFormat.JSON
    raise typer.Exit(run_device(directory, "evaluate", options, as_json=as_json))


@app.command()
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
        from ternbus.edge.shell.deploying import deploy  # noqa: PLC0415 - with numpy and the task

        typer.echo(deploy(source, out, model, data))
        return
    if out.suffix in {".pt", ".onnx"} or data is not None:
        raise ConfigError(
            f"{out.suffix} is written of a task and a model file: ternbus edge export TASK OUT{out.suffix} --model FILE"
        )
    directory = Path(source)
    options = Options(timeout_s=timeout, out=str(out.absolute()))
    act_as_owner(directory)
    raise typer.Exit(run_device(directory, "export", options, as_json=as_json))
