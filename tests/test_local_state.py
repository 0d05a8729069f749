"""Tensors that stay on a device: trained there, kept with the update in one write, in what the device exports."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from support.commands import typed
from support.core_device import (
    DEVICE_KEY,
    aggregator,
    connected,
    evaluated,
    following,
    logged,
    only,
    published,
    trained,
)
from support.growing_outbox import KEY, state_after
from ternbus.broker.crash_points import VARIABLE
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_metadata, load_safetensors
from ternbus.broker.protocol.schema import Schema, to_tensors, to_vector, vector_digest
from ternbus.broker.server import running
from ternbus.edge import Plan, TorchTask, Trained, TrainingError, load_task
from ternbus.edge.core import events
from ternbus.edge.core.actions import SaveModel, StartEvaluation, StartFineTuning, StartTraining, Stop, tensors_of
from ternbus.edge.learn.kinds import staying
from ternbus.edge.learn.local_state import packed, unpacked
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.subnetwork import narrow
from ternbus.edge.shell.worker import fine_tune, train
from ternbus.edge.store import outbox as outboxes
from ternbus.edge.store.outbox import Outbox
from ternbus.lab import cli

SUPPORT = Path(__file__).parent / "support"
HEADS = f"{SUPPORT / 'own_head_task.py'}:TASK"
SHARED = f"{SUPPORT / 'own_head_task.py'}:SHARED"
PLAN = Plan(local_steps=3, batch_size=8, learning_rate=0.1)
TIMEOUT_S = 300.0


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    inputs = torch.randn(40, 6, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def task_of(*stays_local: str, model: Any = norm) -> TorchTask:
    return TorchTask(name="own", model=model, data=data, stays_local=stays_local)


def bits(tensors: Any) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in tensors.items()}


# --- what a PyTorch task keeps


def test_local_tensors_are_not_in_the_model_are_trained_and_go_on_from_where_they_were() -> None:
    """FedBN: all of batch norm stays."""
    task = task_of("1.*")
    start = task.initial(0)
    assert set(start) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    trainer = task.trainer(data=None, partition="all")
    first = trainer.train(start, PLAN, version=0, seed=0)
    assert set(first.tensors) == set(start)
    assert set(first.local) == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert first.local["1.weight"].any()
    again = trainer.train(start, PLAN, version=0, seed=0)
    assert bits(again.local) == bits(first.local)  # without any, it begins as model() made them
    further = trainer.train({**start, **first.local}, PLAN, version=1, seed=0)
    assert all(not np.array_equal(further.local[name], first.local[name]) for name in first.local)
    other = task.trainer(data=None, partition="all")
    assert bits(other.train({**start, **first.local}, PLAN, version=1, seed=0).local) == bits(further.local)
    assert trainer.evaluate({**start, **first.local}).values != trainer.evaluate(start).values


def test_initial_local_tensors_are_the_same_on_every_device() -> None:
    first, second = (task_of("3.*").trainer(data=None, partition="all") for _ in range(2))
    start = task_of("3.*").initial(0)
    assert bits(first.train(start, PLAN, version=0, seed=0).local) == bits(
        second.train(start, PLAN, version=0, seed=0).local
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.end = nn.Linear(6, 2)


def test_a_tied_tensor_is_local_by_any_of_its_names() -> None:
    assert set(task_of("second.*", model=Tied).initial(0)) == {"first.bias", "end.weight", "end.bias"}


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            ["head.*"],
            r"stays_local has 'head\.\*', which matches no tensor of the model; its first is named '0.weight'",
        ),
        (["*"], "all trained parameters match stays_local, and nothing is left to train together"),
        (["*.weight", "*.bias"], "nothing is left to train together"),
    ],
)
def test_patterns_that_leave_nothing_or_match_nothing_are_refused(patterns: Sequence[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        task_of(*patterns).initial(0)


def test_a_narrower_model_has_no_local_tensors() -> None:
    task = task_of("3.*").replaced(narrow=lambda _: norm())
    with pytest.raises(ConfigError, match="the task own has stays_local, and local tensors are of the full width only"):
        narrow(task, 0.5)


def test_local_tensors_of_another_shape_are_named() -> None:
    start = task_of("3.*").initial(0)
    with pytest.raises(ConfigError, match=r"the local tensor 3.bias .* has shape \(7,\), and the task's model \(2,\)"):
        task_of("3.*").evaluator(data=None).evaluate({**start, "3.bias": np.zeros(7, np.float32)})


def test_a_local_tensor_that_diverges_is_not_kept() -> None:
    with pytest.raises(TrainingError, match="head is not finite"):
        Trained(tensors={}, samples=1, metrics={}, local={"head": np.array([np.nan], np.float32)})


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def test_under_sample_privacy_local_parameters_are_trained_and_local_buffers_refused() -> None:
    plan = Plan(local_steps=2, batch_size=8, learning_rate=0.1, dp="sample", dp_clip=1.0, dp_noise=1.0, dp_epsilon=50.0)
    source = RandomSource(np.random.default_rng(0).bytes)
    task = task_of("2.*", model=plain)
    trainer = task.trainer(data=None, partition="all")
    found = trainer.train_privately(task.initial(0), plan, version=0, seed=0, random_source=source)
    assert set(found.local) == {"2.weight", "2.bias"}
    task = task_of("1.*")
    trainer = task.trainer(data=None, partition="all")
    with pytest.raises(ConfigError, match=r"does not allow stays_local for the buffer 1\.running_mean"):
        trainer.train_privately(task.initial(0), plan, version=0, seed=0, random_source=source)


def test_a_check_names_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    (names,) = staying(task_of("3.*")).values()
    assert names == ["3.weight", "3.bias"]
    assert staying(load_task("digits-numpy")) == {}


# --- the device's core, and its outbox


@pytest.mark.parametrize("dp", ["none", "device"])
def test_a_training_keeps_local_tensors_and_sends_none(dp: str) -> None:
    task = task_of("3.*", model=norm)
    start = task.initial(0)
    schema = Schema.of({name: array.shape for name, array in start.items()})
    private = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 50.0, "statistics_rate": 0.0}
    plan = replace(PLAN, **private) if dp == "device" else PLAN  # type: ignore[arg-type]
    job = StartTraining(base=0, schema=schema, vector=to_vector(schema, start), residual=None, plan=plan, seed=1)
    trainer = task.trainer(data=None, partition="all")
    done = train(trainer, job, RandomSource(np.random.default_rng(0).bytes))
    assert isinstance(done, events.TrainingFinished)
    assert done.local is not None
    assert set(unpacked(done.local)) == {"3.weight", "3.bias"}
    assert done.block.schema is schema
    following_job = replace(job, base=1, local=done.local)
    assert set(tensors_of(following_job)) == set(start) | {"3.weight", "3.bias"}
    further = train(trainer, following_job, RandomSource(np.random.default_rng(0).bytes))
    assert isinstance(further, events.TrainingFinished)
    assert further.local != done.local


def test_a_training_that_fails_under_device_privacy_changes_no_local_tensor() -> None:
    class Failing:
        samples = 3

        def train(self, *_: object, **__: object) -> Trained:
            raise ValueError("a sample")

    schema = Schema.of({"w": (3,)})
    plan = Plan(dp="device", dp_clip=1.0, dp_noise=1.0, dp_epsilon=50.0)
    job = StartTraining(base=0, schema=schema, vector=np.zeros(3, np.float32), residual=None, plan=plan, seed=1)
    done = train(Failing(), job, RandomSource(np.random.default_rng(0).bytes))  # type: ignore[arg-type]
    assert isinstance(done, events.TrainingFinished)
    assert done.local is None


def test_fine_tuning_begins_with_local_tensors_and_writes_them() -> None:
    task = task_of("3.*")
    start = task.initial(0)
    schema = Schema.of({name: array.shape for name, array in start.items()})
    own = packed({"3.weight": np.ones((2, 8), np.float32), "3.bias": np.zeros(2, np.float32)})
    job = StartFineTuning(version=3, schema=schema, vector=to_vector(schema, start), plan=PLAN, seed=1, local=own)
    trainer = task.trainer(data=None, partition="all")
    done = fine_tune(trainer, trainer, job)
    assert isinstance(done, events.FineTuned)
    assert set(done.tensors) == set(start) | {"3.weight", "3.bias"}
    assert done.before == trainer.evaluate(tensors_of(job)).values


def test_a_local_tensor_does_not_hide_one_of_the_model() -> None:
    schema = Schema.of({"w": (2,)})
    job = StartEvaluation(
        version=0, schema=schema, vector=np.ones(2, np.float32), local=packed({"w": np.zeros(2, np.float32)})
    )
    assert tensors_of(job)["w"].tolist() == [1, 1]


def test_a_device_keeps_local_tensors_beside_its_update_and_uses_them_in_every_job() -> None:
    scripted, device = following(reports=True)
    device.handle(evaluated(0))
    job = only(device.actions, StartTraining)
    assert job.local == b""
    device.handle(replace(trained(job), local=b"own"))
    assert device.disk is not None
    assert (device.disk.local, device.disk.outstanding is None) == (b"own", False)
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    assert [each.local for each in device.actions if isinstance(each, StartEvaluation)][-1] == b"own"
    assert device.disk.rejoined(device.core.profile.key).local == b"own"


PRIVATE = {"dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 50.0}


@pytest.mark.parametrize("before", ["none", "device"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_local_tensor_brings_samples_without_noise_into_a_training_under_sample_privacy(
    before: str, fails: bool
) -> None:
    """An aggregator that alternates plans would have each sample move the gradients of all others, by the tensors."""
    scripted, device = following(scripted=aggregator(plan={"dp": before, **PRIVATE}))
    device.handle(replace(trained(only(device.actions, StartTraining)), local=b"own"))
    for number, kept in ((1, b""), (2, b"" if fails else b"noisy")):
        assert device.disk is not None
        assert device.disk.outstanding is not None
        device.arrive(
            scripted.status(), scripted.receipt("pi", DEVICE_KEY.key_id, device.disk.outstanding.seq, "accepted")
        )
        scripted.plan = {"dp": "sample", **PRIVATE}
        scripted.advance()
        device.arrive(*scripted.delta(number), scripted.head())
        job = [each for each in device.actions if isinstance(each, StartTraining)][-1]
        assert (job.base, job.plan.dp) == (number, "sample")
        assert job.local == (b"" if number == 1 else kept)
        device.handle(replace(trained(job), local=None if fails else b"noisy"))
    assert device.disk is not None
    rejoined = device.disk.rejoined(device.core.profile.key)
    assert (rejoined.local_under("sample"), rejoined.protected) == (kept, "sample")


def test_equal_tensors_are_packed_as_equal_bytes() -> None:
    one = {"b": np.ones((2, 3), np.float32).T, "a": np.array(2, np.float32)}
    content = packed(dict(reversed(one.items())))
    assert content == packed(one)
    assert bits(unpacked(content)) == bits({name: np.ascontiguousarray(array) for name, array in one.items()})
    assert packed({}) == b""
    assert unpacked(b"") == {}


SAVE = """
import sys
from pathlib import Path
from dataclasses import replace
sys.path[:0] = {paths!r}
from support.growing_outbox import KEY, state_after
from ternbus.edge.store.outbox import Outbox
with Outbox(Path({folder!r}), KEY) as outbox:
    outbox.save(state_after(outbox.state), None, {{}})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("point", "kept"), [("state-written", False), ("", True)])
def test_a_kill_leaves_both_the_update_and_the_local_tensors_or_neither(point: str, kept: bool, tmp_path: Path) -> None:
    with Outbox(tmp_path, KEY) as outbox:
        outbox.save(state_after(outbox.state), None, {})
    script = SAVE.format(paths=[path for path in sys.path if path], folder=str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if point:
        environment[VARIABLE] = point
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=TIMEOUT_S, check=False)
    assert done.returncode == (0 if kept else -signal.SIGKILL)
    with Outbox(tmp_path, KEY) as outbox:
        state = outbox.state
    assert state.outstanding is not None
    assert (state.outstanding.base, state.local) == ((2, b"xx") if kept else (1, b"x"))


def test_an_outbox_without_local_tensors_has_no_row_of_them_and_one_that_loses_them_forgets_them(
    tmp_path: Path,
) -> None:
    with Outbox(tmp_path, KEY) as outbox:
        outbox.save(outbox.state, None, {})
        assert outbox._db.execute("SELECT 1 FROM kept WHERE name = 'local'").fetchone() is None
        outbox.save(replace(outbox.state, local=b"own"), None, {})
        assert outboxes.summary(tmp_path).state.local == b"own"
        outbox.save(replace(outbox.state, local=b""), None, {})
    assert outboxes.summary(tmp_path).state.local == b""


# --- the export of a device


def test_an_export_writes_the_newest_version_and_stops_without_a_status_but_offline() -> None:
    scripted, device = following(role="export", metadata={"statistics": "[]"})
    saved = only(device.actions, SaveModel)
    assert bits(saved.tensors) == bits(to_tensors(scripted.schema, scripted.vectors[0]))
    digest = device.core.follower.digest.hex()
    assert saved.metadata == {"statistics": "[]", "version": "0", "digest": digest}
    assert only(device.actions, Stop) == Stop(code=0, reason="version 0 is written")
    assert [frame.meta["state"] for frame in published(device.actions, "status")] == ["offline"]
    assert not {"training", "evaluated"} & {*logged(device.actions)}


def test_an_export_names_the_digest_of_what_it_writes_whatever_head_and_delta_name() -> None:
    """Where a delta has a checksum as well, devices check that one."""
    scripted = aggregator()
    scripted.advance()
    scripted.lies[1] = bytes(32)
    device = connected("export")
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot(), *scripted.delta(1))
    assert device.core.follower.digest == bytes(32)
    saved = only(device.actions, SaveModel)
    assert (saved.metadata["version"], saved.metadata["digest"]) == ("1", vector_digest(scripted.vectors[1]).hex())


def test_an_export_keeps_the_update_and_writes_local_tensors_also_when_the_federation_is_closed() -> None:
    scripted, device = following()
    own = packed({"head": np.ones(3, np.float32)})
    device.handle(replace(trained(only(device.actions, StartTraining)), local=own))
    scripted.state = "closed"
    exporting = device.restarted(role="export")
    exporting.connect()
    exporting.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    saved, stop = only(exporting.actions, SaveModel), only(exporting.actions, Stop)
    assert saved.tensors["head"].tolist() == [1, 1, 1]
    assert stop.reason == "version 0 is written, with 1 tensors of this device's own"
    assert exporting.disk is not None
    assert exporting.disk.outstanding is not None


def test_an_export_of_another_model_is_refused() -> None:
    _, device = following(role="export", tensors={"w": (1,)})
    assert only(device.actions, Stop).code == 1
    assert not [action for action in device.actions if isinstance(action, SaveModel)]


# --- whole federations


def simulate(tmp_path: Path, name: str, task: str, *options: str) -> tuple[dict[str, Any], str]:
    path = tmp_path / f"{name}.toml"
    path.write_text(
        f'task = "{task}"\ndevices = 4\npartition = "natural"\n[end]\nversions = 6\n[local]\nhold_out = 0.25\n'
        '[[fault]]\nkill = "device:1"\nafter_version = 2\n[simulate]\nevaluate_every = 6\n'
    )
    result = CliRunner().invoke(
        cli.app, ["simulate", str(path), "--out", str(tmp_path / name), "--json", *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((tmp_path / name / "report.json").read_text())
    return report, result.output


@pytest.mark.slow
def test_devices_own_heads_are_worth_more_than_a_shared_one_and_the_report_says_what_it_measures(
    tmp_path: Path,
) -> None:
    own, said = simulate(tmp_path, "own", HEADS)
    shared, _ = simulate(tmp_path, "shared", SHARED)
    assert (
        "3.* of own-head stay on each device (stays_local): the test metrics are those of their initial values" in said
    )
    assert own["local"]["metrics"]["accuracy"]["mean"] > 0.8
    assert shared["local"]["metrics"]["accuracy"]["mean"] < 0.5
    model = load_safetensors(tmp_path / "own" / "model.safetensors")
    assert set(model) == {"1.weight", "1.bias"}


@pytest.mark.slow
def test_any_number_of_processes_and_a_ledger_give_the_same_simulation(tmp_path: Path) -> None:
    one, _ = simulate(tmp_path, "one", HEADS)
    two, _ = simulate(tmp_path, "two", HEADS, "--jobs", "2", "--ledger")
    assert one["versions"] == two["versions"]
    assert one["local"] == two["local"]
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def ternbus(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ternbus", *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    try:
        software = running.choose(running.Engine.MOSQUITTO)
    except ConfigError as error:
        pytest.skip(str(error))
    with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as started:
        yield started.url


@pytest.mark.slow
@pytest.mark.parametrize("task", [HEADS, SHARED])
def test_a_device_exports_the_version_and_what_it_keeps_for_itself(broker: str, tmp_path: Path, task: str) -> None:
    """Without tensors of its own it writes the same bytes as the aggregator."""
    first, home, device = tmp_path / "first.safetensors", tmp_path / "agg", tmp_path / "pi"
    typed(tmp_path, "edge", "init-model", task, first)
    about = "--federation", "lab", "--broker", broker, "--model", first, "--set", "merge.buffer_size=1"
    typed(tmp_path, "aggregator", "init", home, *about)
    typed(tmp_path, "aggregator", "invite", home, "pi", "--evaluator", "judge", "--out", tmp_path)
    serving = subprocess.Popen([sys.executable, "-m", "ternbus", "aggregator", "run", str(home)])
    try:
        ternbus("edge", "join", tmp_path / "pi.toml", device, "--task", task, "--partition", "natural:1")
        ternbus("edge", "run", device, "--versions", "2")
        said = ternbus("edge", "export", device, tmp_path / "own.safetensors")
        ternbus("edge", "join", tmp_path / "judge.toml", tmp_path / "judge", "--task", task)
        judged = ternbus("edge", "evaluate", tmp_path / "judge", "--versions", "1")
    finally:
        serving.terminate()
        serving.wait(TIMEOUT_S)
    typed(tmp_path, "aggregator", "export", home, tmp_path / "all.safetensors")
    everyone, own = load_safetensors(tmp_path / "all.safetensors"), load_safetensors(tmp_path / "own.safetensors")
    kept = unpacked(outboxes.summary(device).state.local)
    assert bits(own) == bits({**everyone, **kept})
    assert load_metadata(tmp_path / "own.safetensors") == load_metadata(tmp_path / "all.safetensors")
    assert load_metadata(tmp_path / "own.safetensors")["version"] == "2"
    assert ("stay on each device (stays_local)" in judged) == (task == HEADS)
    if task == SHARED:
        assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()
        return
    assert "version 2 is written, with 2 tensors of this device's own" in said
    loaded = load_task(task)
    assert isinstance(loaded, TorchTask)
    loaded.model().load_state_dict(load_file(tmp_path / "own.safetensors"))  # strict: nothing is missing


def test_a_class_names_its_local_tensors_too() -> None:
    class Own(TorchTask):
        stays_local = ("3.*",)

        def model(self) -> nn.Module:
            return norm()

        def dataset(self, folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
            return data(folder, split)

    assert bits(Own().initial(0)) == bits(task_of("3.*").initial(0))
