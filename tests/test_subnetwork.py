"""Sub-networks for weak devices: they train the leading corner of each tensor and leave the rest unchanged."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn.partition import select
from ternbus.edge.learn.subnetwork import NarrowTask, channels, narrow
from ternbus.edge.learn.task import Task
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors
from ternbus.edge.shell import agent
from ternbus.edge.shell import cli as edge_cli
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.worker import train
from ternbus.edge.tasks import digits, digits_data, digits_numpy, hapt
from ternbus.edge.torch.trainer import TorchTask
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import End, Narrow, Scenario, Speeds
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation

NARROWING = ("digits", "digits-numpy", "fashion-mnist", "mnist-by-writer", "emnist-62", "cifar10-cnn", "hapt")


def narrowed(name: str, width: float = 0.5) -> NarrowTask:
    task = narrow(load_task(name), width)
    assert isinstance(task, NarrowTask)
    return task


def test_channels_are_rounded_up_and_one_is_left() -> None:
    assert [channels(30, width) for width in (0.1, 0.5, 0.51, 1.0)] == [3, 15, 16, 30]
    assert channels(1, 0.1) == 1


@pytest.mark.parametrize("name", NARROWING)
def test_built_in_tasks_have_narrower_forms_with_all_inputs_and_classes(name: str) -> None:
    task = narrowed(name)
    full = task.initial(0)
    first, last = next(each for each in full if full[each].ndim > 1), list(full)[-1]
    assert task.shapes[first][1:] == full[first].shape[1:]
    assert task.shapes[last] == full[last].shape
    size = sum(int(np.prod(shape)) for shape in task.shapes.values())
    assert 0.2 < size / sum(tensor.size for tensor in full.values()) < 0.52
    assert load_task(name).initial(3).keys() == full.keys()


@pytest.mark.parametrize("name", ["digits", "digits-numpy"])
def test_the_corner_is_trained_and_nothing_else(name: str) -> None:
    task = narrowed(name)
    start = task.initial(0)
    trained = task.trainer(data=None, partition="iid:0/8").train(
        start, Plan.from_meta(task.default_plan), version=0, seed=0
    )
    for tensor, before in start.items():
        changed = trained.tensors[tensor] != before
        assert changed.shape == before.shape
        corner = tuple(slice(size) for size in task.shapes[tensor])
        assert changed[corner].mean() > 0.5, tensor
        changed[corner] = False
        assert not changed.any(), tensor


def test_a_narrow_training_is_that_of_the_narrow_model_itself() -> None:
    """Against a second reckoning: cut the model by hand, train the cut, and look only at the cut."""
    task = narrowed("digits-numpy")
    start, plan = task.initial(0), Plan.from_meta(task.default_plan)
    found = task.trainer(data=None, partition="iid:0/8").train(start, plan, version=0, seed=4)
    half = digits_numpy.HIDDEN // 2
    by_hand = {
        "hidden.weight": start["hidden.weight"][:half].copy(),
        "hidden.bias": start["hidden.bias"][:half].copy(),
        "output.weight": start["output.weight"][:, :half].copy(),
        "output.bias": start["output.bias"],
    }
    alone = digits_numpy.TASK.trainer(data=None, partition="iid:0/8").train(by_hand, plan, version=0, seed=4)
    assert np.array_equal(found.tensors["output.weight"][:, :half], alone.tensors["output.weight"])
    assert np.array_equal(found.tensors["hidden.weight"][:half], alone.tensors["hidden.weight"])
    assert (found.samples, found.metrics["loss"]) == (alone.samples, alone.metrics["loss"])


@pytest.mark.parametrize("codec", ["ternary", "float32"])
def test_what_is_left_out_is_zero_in_the_update_that_is_sent(codec: str) -> None:
    task = narrowed("digits-numpy")
    start = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    mask = {name: np.zeros(tensor.shape, np.float32) for name, tensor in start.items()}
    for name, shape in task.shapes.items():
        mask[name][tuple(slice(size) for size in shape)] = 1
    plan = Plan.from_meta({**task.default_plan, "codec": codec})
    trainer = task.trainer(data=None, partition="iid:0/8")
    vector = to_vector(schema, start)
    job = StartTraining(base=0, schema=schema, vector=vector, residual=None, plan=plan, seed=1)
    found = train(trainer, job)
    assert isinstance(found, TrainingFinished)
    inside = to_vector(schema, mask) == 1
    value = found.block.value()
    assert value[inside].any()
    assert not value[~inside].any()


def test_batch_norms_statistics_of_a_narrow_layer_stay_here() -> None:
    def data(_: Path | None, __: str) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(40, 6, 128, generator=generator) + 3, torch.arange(40) % hapt.CLASSES

    def network(width: float = 1.0) -> torch.nn.Module:
        middle = channels(8, width)
        layers = torch.nn.Conv1d(6, middle, 9), torch.nn.BatchNorm1d(middle), torch.nn.ReLU(), hapt.Summary()
        return torch.nn.Sequential(*layers, torch.nn.Linear(3 * middle, hapt.CLASSES))

    task = TorchTask(name="own", model=network, narrow=network, data=data)
    start, plan = task.initial(0), Plan(local_steps=2)
    found = narrow(task, 0.5).trainer(data=None, partition="all").train(start, plan, version=0, seed=0)
    whole = task.trainer(data=None, partition="all").train(start, plan, version=0, seed=0)
    statistics = [name for name in start if "running_" in name]
    assert len(statistics) == 2
    for name in statistics:
        assert np.array_equal(found.tensors[name], start[name])
        assert not np.array_equal(whole.tensors[name], start[name])


class Wrong(digits_numpy.DigitsNumpy):
    def initial(self, seed: int) -> dict[str, FloatArray]:
        tensors = super().initial(seed)
        return tensors if self.hidden == digits_numpy.HIDDEN else self.wrong(tensors)

    def wrong(self, tensors: Tensors) -> dict[str, FloatArray]:
        return {f"{name}_": tensor for name, tensor in tensors.items()}


class Wider(Wrong):
    def wrong(self, tensors: Tensors) -> dict[str, FloatArray]:
        return {name: np.concatenate([tensor] * 3) for name, tensor in tensors.items()}


class Same(Wrong):
    def wrong(self, tensors: Tensors) -> dict[str, FloatArray]:
        return digits_numpy.TASK.initial(0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Wrong(), "the same tensor names"),
        (Wider(), "which is not within"),
        (Same(), "is as wide as the full one"),
        (digits.TASK.replaced(narrow=None), "the task digits has no narrower model"),
    ],
)
def test_what_is_no_narrower_form_is_refused_by_name(task: Task, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        narrow(task, 0.5)
    assert narrow(task, 1.0) is task


@pytest.mark.parametrize("width", [0.0, 0.04, 1.01, -1.0, float("nan")])
def test_a_width_is_a_share(width: float) -> None:
    with pytest.raises(ConfigError, match="the width is"):
        narrow(digits_numpy.TASK, width)


def test_a_device_keeps_its_width_and_makes_no_narrow_model_of_its_own(tmp_path: Path) -> None:
    invitation = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:9", aggregator_key="ab" * 32, code="c" * 32
    )
    home = DeviceDirectory(tmp_path / "pi")
    settings = home.prepare(invitation, task="digits-numpy", data=None, partition="all", hold_out=0.2, width=0.25)
    assert home.settings() == settings
    assert settings.share_of_channels == 0.25
    with pytest.raises(ConfigError, match="full width"):
        agent.check(settings, Options(fine_tune=1.0))
    for width, message in (("2", "the width is 2"), ("wide", "give a number from 0.05 to 1")):
        with pytest.raises(ConfigError, match=message):
            replace(settings, width=width)
    path = tmp_path / "pi.toml"
    path.write_text(invitation.dumps())
    path.chmod(0o600)
    arguments = ["join", str(path), str(tmp_path / "other"), "--task", "digits-numpy", "--width", "3"]
    assert "the width is 3" in str(CliRunner().invoke(edge_cli.app, arguments).exception)
    assert not (tmp_path / "other").exists()


# --- a federation

PART = Scenario(
    task="digits-numpy",
    devices=6,
    partition="iid",
    speeds=Speeds(sigma=0.5, median_s=1.0),
    narrow=Narrow(share=0.5, width=0.5),
    end=End(versions=25),
)


def simulated(wanted: Scenario) -> tuple[float, Simulation]:
    simulation = Simulation(wanted, digits_numpy.TASK, Lines(io.StringIO()))
    simulation.run()
    return simulation.report(1.0)["accuracy"], simulation


def test_a_federation_learns_with_half_of_its_devices_at_half_width() -> None:
    assert sorted(PART.widths) == [0.5] * 3 + [1.0] * 3
    accuracy, _ = simulated(PART)
    assert accuracy > 0.85


def test_where_all_are_narrow_the_rest_of_the_model_stays_as_it_was_bit_for_bit() -> None:
    accuracy, simulation = simulated(replace(PART, narrow=Narrow(share=1.0, width=0.5)))
    assert accuracy > 0.5
    published = simulation.aggregator.core.model.published
    first = to_vector(simulation.schema, digits_numpy.TASK.initial(0))
    task = narrowed("digits-numpy")
    mask = {name: np.zeros(tensor.shape, np.float32) for name, tensor in task.initial(0).items()}
    for name, shape in task.shapes.items():
        mask[name][tuple(slice(size) for size in shape)] = 1
    inside = to_vector(simulation.schema, mask) == 1
    assert np.array_equal(published[~inside], first[~inside])
    assert not np.array_equal(published[inside], first[inside])


def test_narrow_devices_try_versions_whole() -> None:
    wanted = replace(PART, narrow=Narrow(share=1.0), local=scenario.Local(hold_out=0.2), end=End(versions=3))
    _, simulation = simulated(wanted)
    assert simulation.moment().local is not None


def test_the_scenario_says_who_is_narrow() -> None:
    found = scenario.loads("devices = 4\n[narrow]\nshare = 0.25\nwidth = 0.3", "x")
    assert sorted(found.widths) == [0.3, 1.0, 1.0, 1.0]
    assert scenario.loads("", "x").widths == (1.0,) * 8
    for text, message in (
        ("[narrow]\nshare = 2", r"narrow\.share is 2"),
        ("[narrow]\nwidth = 0", "the width is 0"),
        ("[narrow]\nshare = 0.5\n[local]\nhold_out = 0.2\nfine_tune = 1", "full-width models only"),
    ):
        with pytest.raises(ConfigError, match=message):
            scenario.loads(text, "x")


def test_each_device_has_its_own_data_and_width() -> None:
    wanted = replace(PART, partition="dirichlet:0.3", end=End(versions=4))
    _, simulation = simulated(wanted)
    assert isinstance(simulation.ledger, MemoryLedger)
    labels = digits_data.load("train")[1]
    sizes = {f"device-{index}": select(wanted.partition_of(index), labels).size for index in range(wanted.devices)}
    assert len(set(sizes.values())) == wanted.devices
    for row in simulation.ledger.contributions:
        assert row.samples == sizes[row.device]
