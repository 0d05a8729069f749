"""The owner's limits of one training: at join, in edge.toml, in what the device does, and in what it is charged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.core_device import aggregator, following, only
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.fine_tuning import plan_of
from ternbus.edge.core.state import State
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import cost
from ternbus.edge.shell import cli
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.worker import train
from ternbus.edge.store.outbox import Outbox
from ternbus.edge.tasks import digits_numpy

INVITATION = Invitation(
    federation="fed", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key="ab" * 32, code="c" * 32
)


def test_the_smaller_of_plan_and_owner_counts() -> None:
    limits = TrainingLimits(seconds=60.0, steps=10)
    assert limits.bound(Plan(local_steps=99)).steps(1000) == 10
    assert limits.bound(Plan(local_steps=3)).steps(1000) == 3
    assert limits.bound(Plan(local_epochs=5, batch_size=10)).steps(1000) == 10
    assert [limits.bound(Plan(local_seconds=each)).local_seconds for each in (None, 5.0, 99.0)] == [60.0, 5.0, 60.0]
    assert TrainingLimits().bound(Plan()) == Plan()


def test_no_plan_lifts_the_owners_limit() -> None:
    """Not by a key of the same name either."""
    scripted = aggregator(plan={"local_steps": 50, "local_seconds": 1e6, "steps_max": 1000})
    _, device = following(scripted=scripted, limits=TrainingLimits(seconds=7.5, steps=4))
    plan = only(device.actions, StartTraining).plan
    assert (plan.steps(1000), plan.local_seconds) == (4, 7.5)


def test_a_model_of_ones_own_is_not_limited() -> None:
    plan = plan_of(TrainingLimits(seconds=1.0, steps=1).bound(Plan(batch_size=10)), 3)
    assert (plan.steps(100), plan.local_seconds) == (30, None)


@pytest.mark.parametrize("limits", [TrainingLimits(steps=2), TrainingLimits(seconds=1e-9)])
def test_training_stops_at_the_limit_and_sends_what_it_has(limits: TrainingLimits) -> None:
    task = digits_numpy.TASK
    start = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    plan = limits.bound(Plan(local_steps=500))
    work = StartTraining(base=0, schema=schema, vector=to_vector(schema, start), residual=None, plan=plan, seed=1)
    result = train(task.trainer(data=None, partition="iid:0/8"), work)
    assert isinstance(result, events.TrainingFinished)
    assert result.metrics["steps"] == (limits.steps or 1)
    assert result.block.value().any()


def test_what_runs_at_most_is_what_the_budget_is_asked_for() -> None:
    plan = Plan(dp="sample", dp_clip=1, dp_noise=1, dp_epsilon=8, batch_size=10, local_steps=500)
    assert cost(TrainingLimits(steps=20).bound(plan), 100).steps == 20


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0.0}, {"seconds": float("nan")}, {"seconds": float("inf")}, {"steps": 0}]
)
def test_a_limit_is_a_number_above_zero(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="max_"):
        TrainingLimits(**wrong)  # type: ignore[arg-type]


def joined(folder: Path, limits: TrainingLimits | None) -> DeviceDirectory:
    home = DeviceDirectory(folder)
    settings = home.prepare(INVITATION, task="digits-numpy", data=None, partition="all", limits=limits)
    home.write(replace(settings, code=""))
    return home


def test_limits_are_kept_with_the_device_and_shown(tmp_path: Path) -> None:
    home = joined(tmp_path / "pi", TrainingLimits(seconds=90.0, steps=200))
    assert home.settings().limits == TrainingLimits(seconds=90.0, steps=200)
    with Outbox(home.folder, KeyId(bytes(8))) as outbox:
        outbox.save(State(key=KeyId(bytes(8))), None, {})
    shown = json.loads(CliRunner().invoke(cli.app, ["status", str(home.folder), "--json"]).output)
    assert (shown["max_seconds"], shown["max_steps"]) == (90.0, 200)


def test_a_folder_from_before_has_no_limits(tmp_path: Path) -> None:
    home = joined(tmp_path / "pi", None)
    assert "max_s" not in (home.folder / "edge.toml").read_text()
    assert home.settings().limits == TrainingLimits()


@pytest.mark.parametrize("wrong", [{"max_seconds": "soon"}, {"max_steps": "1.5"}, {"max_steps": "0"}])
def test_a_wrong_limit_in_edge_toml_is_named(tmp_path: Path, wrong: dict[str, str]) -> None:
    home = joined(tmp_path / "pi", None)
    with pytest.raises(ConfigError, match=min(wrong)):
        replace(home.settings(), **wrong)


def test_join_takes_them(tmp_path: Path) -> None:
    invitation = tmp_path / "pi.toml"
    invitation.write_text(INVITATION.dumps())
    invitation.chmod(0o600)
    line = ["join", str(invitation), str(tmp_path / "pi"), "--task", "digits-numpy", "--timeout", "0"]
    CliRunner().invoke(cli.app, [*line, "--max-seconds", "2.5", "--max-steps", "9"])
    assert DeviceDirectory(tmp_path / "pi").settings().limits == TrainingLimits(seconds=2.5, steps=9)
    renewed = CliRunner().invoke(cli.app, [*line[:3], "--renew", "--max-steps", "9"])
    assert isinstance(renewed.exception, ConfigError)
