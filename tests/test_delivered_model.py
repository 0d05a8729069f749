"""What is reported is what is delivered: a plain reader of the exported file measures what the report says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from support.commands import typed
from ternbus.edge import TorchTask, load_task
from ternbus.lab import cli

TIMEOUT_S = 300.0
MODULE = Path(__file__).parent / "support" / "batch_norm_task.py"
OPTIMIZERS = ['name = "fedavgm"', 'name = "fedadam"\nlearning_rate = 0.1', 'name = "fedyogi"\nlearning_rate = 0.1']


def scenario_of(folder: Path, optimizer: str, *, versions: int = 8, plan: str = "", devices: int = 8) -> Path:
    path = folder / "s.toml"
    text = f'task = "{MODULE}:TASK"\ndevices = {devices}\npartition = "iid"\n[end]\nversions = {versions}\n'
    path.write_text(f"{text}[plan]\n{plan}\n[aggregator.optimizer]\n{optimizer}\n")
    return path


def measured(path: Path) -> tuple[float, float, int]:
    """Accuracy and loss of the file on the test data, by PyTorch alone, and the rows with a NaN."""
    task = load_task(f"{MODULE}:TASK")
    assert isinstance(task, TorchTask)
    net: nn.Module = task.model().eval()
    net.load_state_dict(load_file(path), strict=False)
    inputs, targets = task.data(None, "test")
    with torch.no_grad():
        outputs = net(inputs)
    loss = nn.functional.cross_entropy(outputs, targets)
    return (outputs.argmax(1) == targets).float().mean().item(), loss.item(), int(outputs.isnan().any(1).sum())


def check(report: dict[str, Any], model: Path) -> None:
    last = report["versions"][-1]
    found, loss, strange = measured(model)
    assert strange == 0
    assert load_file(model)["2.running_var"].min() >= 0
    assert (last["accuracy"], last["loss"]) == pytest.approx((found, loss), abs=1e-6)  # six digits
    assert report["accuracy"] == last["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_simulated_model_with_batch_norm_is_delivered_as_reported(tmp_path: Path, optimizer: str) -> None:
    scenario = scenario_of(tmp_path, optimizer)
    contents = []
    for name, more in (("memory", []), ("disk", ["--ledger"])):
        result = CliRunner().invoke(
            cli.app, ["simulate", str(scenario), "--out", str(tmp_path / name), "--json", *more]
        )
        assert result.exit_code == 0, result.output
        check(json.loads((tmp_path / name / "report.json").read_text()), tmp_path / name / "model.safetensors")
        contents.append((tmp_path / name / "model.safetensors").read_bytes())
    typed(tmp_path, "aggregator", "export", "disk/aggregator", "again.safetensors")
    assert {*contents, (tmp_path / "again.safetensors").read_bytes()} == {contents[0]}


def test_a_model_with_batch_norm_under_device_privacy_is_delivered_as_reported(tmp_path: Path) -> None:
    plan = 'dp = "device"\ndp_clip = 1.0\ndp_noise = 1.0\ndp_epsilon = 200.0'
    scenario = scenario_of(tmp_path, 'name = "fedavgm"', versions=4, plan=plan)
    result = CliRunner().invoke(cli.app, ["simulate", str(scenario), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    check(json.loads((tmp_path / "out" / "report.json").read_text()), tmp_path / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[0], pytest.param(OPTIMIZERS[1], marks=pytest.mark.extended)])
def test_a_run_of_real_processes_delivers_what_its_evaluator_reported(tmp_path: Path, optimizer: str) -> None:
    scenario = scenario_of(tmp_path, optimizer, versions=6, devices=3)
    run = [sys.executable, "-m", "ternbus", "lab", "run", str(scenario), "--out", str(tmp_path / "out")]
    subprocess.run(run, check=True, timeout=TIMEOUT_S, capture_output=True)
    check(json.loads((tmp_path / "out" / "report.json").read_text()), tmp_path / "out" / "model.safetensors")
    typed(tmp_path, "aggregator", "export", "out/aggregator", "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
