"""`ternbus edge check` tries what the federation's plan and a device's own settings ask for."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from support.edge_processes import CODE
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge import TorchTask
from ternbus.edge.core.state import State
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.shell.check_report import Report
from ternbus.edge.shell.cli import app
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.preflight import Conditions, check
from ternbus.edge.store.outbox import Outbox

BY_SAMPLE = {"dp": "sample", "dp_clip": 1.0, "dp_noise": 2.0, "dp_epsilon": 8.0}


def data(_folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = 60 if split == "train" else 30
    return torch.randn(rows, 8, generator=draw), torch.arange(rows) % 3


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(inputs[:, None])[0][:, -1])
        return out


def plain() -> nn.Module:
    return nn.Linear(8, 3)


def of_both_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    if not torch.is_grad_enabled() and len(targets) < 8 and len(targets.unique()) < 3:  # as AUC does
        raise ValueError("only one class is present")
    return (outputs.argmax(1) == targets).float().mean()


NORMED = TorchTask(name="own", model=normed, data=data)


def asked(task: TorchTask, plan: Mapping[str, object] | None = None, **about: object) -> Report:
    return check(task, Conditions(**about), plan)  # type: ignore[arg-type]


def test_batch_norm_cannot_train_on_a_batch_of_one_sample() -> None:
    report = asked(NORMED)
    assert report.problems == []
    assert "a device with one sample cannot train: train() raised ValueError: Expected more than 1" in report.notes[-1]
    (problem,) = asked(NORMED, {"batch_size": 1}).problems
    assert problem.startswith("train() raised ValueError: Expected more than 1 value per channel")


@pytest.mark.slow
def test_a_layer_that_does_not_take_the_data_is_no_fault_of_a_file_of_this_library(tmp_path: Path) -> None:
    """As the command is installed: no path tells which source is this library's where it is editable."""
    (tmp_path / "wide.py").write_text(
        "import torch\nfrom torch import nn\nfrom ternbus.edge import TorchTask\n"
        "def data(folder, split):\n    return torch.ones(60, 20), torch.arange(60) % 3\n"
        "TASK = TorchTask(name='wide', model=lambda: nn.Linear(21, 3), data=data)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "ternbus", "edge", "check", "wide:TASK", "--json"], cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    says = "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied ({}x20 and 21x3); look at the task's model, "
    train, evaluate = json.loads(ran.stdout)["problems"]
    assert train == f"train() {says.format(32)}loss and data"
    assert evaluate == f"evaluate() {says.format(60)}loss and data"


def test_an_owner_of_one_sample_is_a_problem_where_one_sample_cannot_be_trained() -> None:
    owners = np.repeat([0, 1, 2], [30, 29, 1])
    (problem,) = asked(TorchTask(name="own", model=normed, data=data, owners=lambda _: owners)).problems
    assert problem.startswith("1 owner in the data has one sample, and a device with one cannot train: train() raised")
    assert asked(TorchTask(name="own", model=plain, data=data, owners=lambda _: owners)).problems == []


@pytest.mark.parametrize("made", [normed, Recurrent])
def test_a_layer_without_gradients_of_samples_is_a_problem_only_under_dp_sample(made: type[nn.Module]) -> None:
    task = TorchTask(name="own", model=made, data=data)
    assert asked(task).problems == []
    (problem,) = asked(task, BY_SAMPLE).problems
    assert problem.startswith('dp = "sample" cannot train this model')


def test_a_budget_that_pays_for_no_training_is_a_problem() -> None:
    plan = {"dp": "device", "dp_clip": 1.0, "dp_noise": 0.1, "dp_epsilon": 1.0}
    report = check(load_task("digits-numpy"), plan=plan)
    (problem,) = report.problems
    assert problem.startswith("one training would spend an epsilon of ")
    assert check(load_task("digits-numpy"), plan={**plan, "dp_noise": 10.0}).problems == []


def test_what_the_device_requires_and_the_plan_lacks_is_a_problem() -> None:
    policy = PrivacyPolicy(kind="device", epsilon=8.0, delta=1e-5)
    (problem,) = check(load_task("digits-numpy"), Conditions(policy=policy)).problems
    assert problem.startswith('the device does not train by this plan: its owner requires dp = "device"')


def test_a_metric_that_needs_several_classes_is_named_before_a_device_holds_out_one() -> None:
    task = TorchTask(name="own", model=plain, data=data, metric=of_both_classes)
    report = asked(task)
    assert report.problems == []
    assert any(
        "holds out one sample, or one class, cannot evaluate: evaluate() raised" in note for note in report.notes
    )
    (problem,) = asked(task, partition="iid:0/10", hold_out=0.2).problems  # it holds out one of six
    assert problem.startswith("evaluate() of the held-out data raised ValueError: only one class is present")


def test_a_metric_that_always_fails_is_complained_of_once() -> None:
    report = asked(TorchTask(name="own", model=plain, data=data, metric=lambda outputs, targets: outputs))
    assert len(report.problems) == 1
    assert report.notes == []


def test_a_task_that_fails_without_a_folder_of_data_says_how_to_name_one(tmp_path: Path) -> None:
    task = TorchTask(name="own", model=plain, data=lambda folder, split: np.load(folder / "x.npy"))  # type: ignore[operator]
    for problem in asked(task).problems:
        assert problem.endswith("; if it needs data, name their folder with --data")
    for problem in asked(task, data=tmp_path).problems:
        assert "No such file or directory" in problem
        assert "--data" not in problem


def test_width_hold_out_and_the_owners_limits_count() -> None:
    about = Conditions(width=0.5, hold_out=0.2, limits=TrainingLimits(steps=3))
    report = check(load_task("digits"), about)
    assert report.problems == []
    assert (report.facts["samples"], report.facts["steps"]) == (1151, 3)
    (problem,) = check(load_task("digits"), Conditions(width=0.5), {**BY_SAMPLE, "dp_noise": 10.0}).problems
    assert "no train_privately(), which no narrower model has" in problem
    assert "no narrower model" in asked(NORMED, width=0.5).problems[0]


def run(*arguments: object) -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return ran.exit_code, ran.stdout


def test_the_command_takes_the_plan_from_options_and_files(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text("devices = 3\n[plan]\nlocal_epochs = 2\nbatch_size = 100\n")
    code, out = run("digits-numpy", "--plan-from", scenario, "--plan", "batch_size=50", "--json")
    assert (code, json.loads(out)["steps"]) == (0, round(2 * 1438 / 50))
    code, out = run("digits-numpy", "--plan", "batch_size=none")
    assert code == 2
    assert "problem: the plan: batch_size is 'none'" in out
    code, out = run("digits-numpy", "--plan", "batch_siz=5")
    assert (code, "batch_siz is an unknown key: do you mean batch_size?" in out) == (2, True), out
    scenario.write_text("allow_plan_keys = ['mine']\n[plan]\nmine = 1\n")
    assert run("digits-numpy", "--plan-from", scenario)[0] == 0
    scenario.write_text("[plan]\nmine = 1\n[plan_check]\nallowed_keys = ['mine']\n")  # as in aggregator.toml
    assert run("digits-numpy", "--plan-from", scenario)[0] == 0
    for wrong in (["--plan", "batch_size"], ["--plan-from", tmp_path / "none.toml"], ["--hold-out", "0.9"], []):
        task = ["digits-numpy"] if wrong else []
        ran = CliRunner().invoke(app, ["check", *task, *map(str, wrong)])
        assert isinstance(ran.exception, ConfigError), wrong
    scenario.write_text("devices = 3\n")
    ran = CliRunner().invoke(app, ["check", "digits-numpy", "--plan-from", str(scenario)])
    assert "has no section [plan]" in str(ran.exception)


def test_the_command_checks_a_device_by_its_directory(tmp_path: Path) -> None:
    invited = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:1", code=CODE,
        aggregator_key=Identity.generate().public.hex(),
    )  # fmt: skip
    DeviceDirectory(tmp_path / "pi").prepare(
        invited, task="digits-numpy", data=None, partition="iid:0/8", hold_out=0.25, limits=TrainingLimits(steps=2)
    )
    code, out = run("--dir", tmp_path / "pi", "--json")
    found = json.loads(out)
    assert (code, found["task"], found["samples"], found["steps"]) == (0, "digits-numpy", 135, 2)
    code, out = run("--dir", tmp_path / "pi", "--partition", "iid:0/4", "--json")
    assert json.loads(out)["samples"] == 270


def test_a_device_whose_federation_breaks_a_pin_is_not_ready(tmp_path: Path) -> None:
    invited = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:1", code=CODE,
        aggregator_key=Identity.generate().public.hex(),
    )  # fmt: skip
    home = DeviceDirectory(tmp_path / "pi")
    home.prepare(
        invited, task="digits-numpy", data=None, partition="iid:0/8", hold_out=0, sums=SumPolicy(helpers=(bytes(32),))
    )
    with Outbox(home.folder, KeyId(bytes(8))) as outbox:
        outbox.save(State(key=KeyId(bytes(8)), refusal="the helper is not in the terms"), None, {})
    code, out = run("--dir", home.folder, "--json")
    assert (code, [*json.loads(out)["problems"]]) == (
        2,
        ["the device makes no update by the newest plan that it has seen: the helper is not in the terms"],
    )
    assert run("--dir", home.folder, "--plan", "batch_size=8")[0] == 0  # another plan is what is asked for
