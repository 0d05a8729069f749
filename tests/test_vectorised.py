"""Trainings of several simulated devices at once: the models of trainings alone, to rounding; and what is alone."""

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.commands import typed
from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.protocol.schema import Vector
from ternbus.edge import TorchTask
from ternbus.edge.learn.subnetwork import channels
from ternbus.edge.learn.task import Start, Task, Trained, Trainer, TrainingError, VectorisedTrainer
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import TrainingResult
from ternbus.edge.tasks import digits
from ternbus.lab.notebook.federation import Federation
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.availability import Availability
from ternbus.lab.scenario.scenario import End, Hostile, Scenario, Speeds
from ternbus.lab.virtual.computation import Computation
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.training import InProcess, Pair, Widths
from ternbus.lab.virtual.vectorised import FOREIGN, SUBNETWORK, Training, Vectorised, each_at_once

RELATIVE = 1e-5  # of a device's change, in the L2 norm: what is promised in docs/lab.md
SWITCHED = 0.05  # likewise where rounding has switched a unit of ReLU on or off: on each kind of processor another
DEVICES = 6


def mlp(width: float = 1.0) -> nn.Module:
    units = channels(32, width)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))


def task_of(model: Callable[[], nn.Module] = mlp, **more: Any) -> TorchTask:
    plan = {"local_epochs": 2, "batch_size": 16, "learning_rate": 0.1}
    return TorchTask(name="small", model=model, data=digits.data, default_plan=plan, **more)


def starts_of(task: TorchTask) -> list[Start]:
    """Trainings of devices with unequal data, on unequal models of three versions."""
    partitions = [f"dirichlet:0.5:{device}/{DEVICES}:0" for device in range(DEVICES)]
    trainers = task.trainers(data=None, partitions=partitions)
    return [
        Start(trainer=trainer, tensors=task.initial(number % 2), version=number % 3, seed=100 + number)
        for number, trainer in enumerate(trainers)
    ]


def at_once(starts: Sequence[Start], plan: Plan) -> list[Trained | TrainingError]:
    trainer = starts[0].trainer
    assert isinstance(trainer, VectorisedTrainer)
    assert trainer.alone(plan) == ""
    return trainer.train_at_once(plan, starts)


def apart(one: Trained, other: Trained, start: Start) -> float:
    """The distance of two changes as a share of the first."""
    first, second = (
        np.concatenate([(each.tensors[name] - tensor).ravel() for name, tensor in start.tensors.items()])
        for each in (one, other)
    )
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


class OwnLoss(nn.Module):
    """Two inputs by name, a number for each sample, and a parameter that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, images: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = self.scale * self.layer(images.flatten(1)).squeeze(1) * weight
        return found


class InPlace(nn.Module):
    """It changes its inputs, and uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layer(images.mul_(0.5).flatten(1)).relu_()
        found: Tensor = self.last(self.layer(hidden))
        return found


def named(_: Any, split: Any) -> dict[str, Tensor]:
    images, labels = digits.data(None, split)
    return {"images": images, "weight": torch.ones(len(labels)), "target": labels.float()}


NAMED = TorchTask(name="named", model=OwnLoss, data=named, loss=nn.MSELoss())


@pytest.mark.parametrize(
    ("task", "plan"),
    [
        (task_of(), {}),
        (task_of(), {"nesterov": True, "weight_decay": 0.01, "proximal_mu": 0.1}),
        (task_of(), {"schedule": "cosine", "schedule_versions": 9, "step_schedule": "linear", "warmup_steps": 2}),
        (task_of(), {"optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.1}),
        (task_of(), {"optimizer": "rmsprop", "learning_rate": 0.001}),
        (task_of(InPlace), {}),
        (digits.TASK, {"local_epochs": 1}),  # convolutions, and dropout
        (NAMED, {"learning_rate": 0.001, "batch_size": 8}),
    ],
)
def test_devices_at_once_are_trained_as_each_alone(task: TorchTask, plan: dict[str, object]) -> None:
    starts, wanted = starts_of(task), Plan.from_meta({**task.default_plan, **plan})
    before = torch.get_rng_state()
    found = at_once(starts, wanted)
    assert torch.equal(torch.get_rng_state(), before)
    has_units = task is not NAMED  # of ReLU
    distances, relative = [], 1e-2 if has_units else 1e-4
    for start, result in zip(starts, found, strict=True):
        alone = start.trainer.train(start.tensors, wanted, version=start.version, seed=start.seed)
        assert isinstance(result, Trained)
        distances.append(apart(alone, result, start))
        assert result.samples == alone.samples
        assert {**result.metrics, "seconds": 0} == pytest.approx({**alone.metrics, "seconds": 0}, rel=relative)
    assert statistics.median(distances) < RELATIVE
    assert max(distances) < (SWITCHED if has_units else RELATIVE)


def test_one_device_that_diverges_is_none_of_the_others_concern() -> None:
    task = task_of()
    starts = starts_of(task)
    wrong = {name: np.full_like(tensor, 1e30) for name, tensor in starts[1].tensors.items()}
    starts[1] = Start(trainer=starts[1].trainer, tensors=wrong, version=0, seed=1)
    found = at_once(starts, Plan.from_meta(task.default_plan))
    assert [type(each) for each in found] == [Trained, TrainingError, *[Trained] * (DEVICES - 2)]


def scenario_of(**more: Any) -> Scenario:
    about: dict[str, Any] = {
        "devices": 8,
        "partition": "dirichlet:0.5",
        "speeds": Speeds(sigma=0.7, median_s=10.0),
        "aggregator": {"merge.buffer_size": 3},
        "end": End(versions=6),
        **more,
    }
    return Scenario(task="small", **about)


class Others:
    """Two other processes, in this one."""

    count = 2

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def begin(self, groups: Sequence[Sequence[Training]]) -> Callable[[], list[TrainingResult]]:
        found = each_at_once(self._pairs, groups)
        return lambda: found


class Ended(Others):
    """Processes that have ended."""

    def begin(self, groups: Sequence[Sequence[Training]]) -> Callable[[], list[TrainingResult]]:
        raise FederationError("a worker process has ended unexpectedly")


def run(
    wanted: Scenario,
    task: Task,
    most: int = 1,
    lines: list[str] | None = None,
    others: Callable[[Sequence[Pair]], "Others"] | None = None,
) -> tuple[Simulation, Any]:
    """A simulation that has ended, and the place where it trained."""
    places: list[Any] = []

    def place(trainers: Any, widths: Widths) -> Any:
        said, processes = [] if lines is None else lines, None if others is None else others(trainers)
        vectorised = Vectorised(trainers, widths, most, said.append, processes)
        places.append(vectorised if most > 1 else InProcess(trainers, widths))
        return places[0]

    simulation = Simulation(wanted, task, Lines(io.StringIO()), place=place)
    simulation.run()
    return simulation, places[0]


def digests(simulation: Simulation) -> object:
    assert isinstance(simulation.ledger, MemoryLedger)
    return simulation.ledger.digests


def published(simulation: Simulation) -> Vector:
    return simulation.aggregator.core.model.published


ASYNCHRONOUS, BARRIER = scenario_of(), scenario_of(sync=True, aggregator={})
COMING_AND_GOING = scenario_of(
    availability=Availability(hours=20.0, session_min=1.0, pause_min=0.2, drop_out=0.3), end=End(versions=4)
)
WIDTHS = scenario_of(aggregator={"merge.buffer_size": 3, "search.arms": [{"width": 0.5}, {"width": 1.0}]})


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted",
    [ASYNCHRONOUS, BARRIER, COMING_AND_GOING, WIDTHS],
    ids=["async", "barrier", "availability", "arms of width"],
)
def test_a_simulation_at_once_is_that_of_one_by_one(wanted: Scenario) -> None:
    task, lines = task_of(narrow=mlp), list[str]()
    alone, _ = run(wanted, task)
    found, place = run(wanted, task, 4, lines)
    assert digests(run(wanted, task, 4)[0]) == digests(found)  # the same bits each time
    assert lines == ([f"trained one by one, not vectorised: {SUBNETWORK}"] if wanted is WIDTHS else [])
    one, other = alone.report(0.0), found.report(0.0)
    assert [row["seconds"] for row in one["versions"]] == [row["seconds"] for row in other["versions"]]
    assert one["updates"] == other["updates"]
    assert other["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=0.02)
    assert not any(each.end[0] < found.clock.now for each in place._waiting.values())
    assert len(place._results) < wanted.devices


@pytest.mark.parametrize("wanted", [ASYNCHRONOUS, BARRIER], ids=["async", "barrier"])
def test_parts_of_a_group_in_several_processes_have_the_results_of_one(wanted: Scenario) -> None:
    task, lines = task_of(), list[str]()
    alone, _ = run(wanted, task)
    found, _ = run(wanted, task, 2, lines, Others)
    assert lines == []
    assert digests(run(wanted, task, 2, others=Others)[0]) == digests(found)
    one, other = alone.report(0.0), found.report(0.0)
    assert one["updates"] == other["updates"]
    np.testing.assert_allclose(published(found), published(alone), atol=0.02)


def test_a_process_that_has_ended_ends_the_simulation_in_words() -> None:
    with pytest.raises(FederationError, match="a worker process has ended unexpectedly"):
        run(BARRIER, task_of(), 2, others=Ended)


@pytest.mark.slow
def test_a_task_in_memory_trains_at_once_in_several_processes() -> None:
    inputs, targets = digits.data(None, "train")
    clients = {name: (inputs[part::4], targets[part::4]) for part, name in enumerate("abcd")}
    fed = Federation(model=mlp, loss="cross_entropy", clients=clients, test=digits.data(None, "test"))
    plan = {"local_epochs": 1, "batch_size": 16, "learning_rate": 0.1}
    runs = [fed.simulate(versions=2, plan=plan, sync=True, callbacks=[], vectorise=2, jobs=jobs) for jobs in (1, 2, 2)]
    one, two, again = ([*run.model.parameters()] for run in runs)
    assert all(torch.equal(first, second) for first, second in zip(two, again, strict=True))
    assert all(torch.allclose(first, second, atol=1e-4) for first, second in zip(one, two, strict=True))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))


class LooksAtValues(nn.Module):
    """A model whose way depends on its values, which `torch.func` cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layer(inputs.flatten(1))
        return found * 2 if found.sum().item() > 0 else found


@pytest.mark.parametrize(
    ("task", "plan", "why"),
    [
        (load_task("digits-numpy"), {}, "a task without PyTorch"),
        (task_of(), {"grad_clip": 1.0}, "the plan has grad_clip"),
        (task_of(), {"precision": "auto"}, "the plan's precision or memory_format"),
        (task_of(with_batch_norm), {}, "the model has buffers"),
        (task_of(LooksAtValues), {}, "torch.func cannot vectorise it"),
        (task_of(augment=lambda inputs: inputs), {}, "the task augments its inputs"),
    ],
)
def test_what_cannot_be_at_once_is_trained_one_by_one_and_said_once(
    task: Task, plan: dict[str, object], why: str
) -> None:
    wanted, lines = scenario_of(plan=plan, end=End(versions=2)), list[str]()
    found, _ = run(wanted, task, 4, lines)
    assert digests(found) == digests(run(wanted, task)[0])
    assert len(lines) == 1
    assert lines[0].startswith("trained one by one, not vectorised: ")
    assert why in lines[0]


class Limited:
    """A trainer that finds a limit of its own, as dropout on a GPU is one."""

    def __init__(self, inner: Trainer) -> None:
        self.samples, self.train, self.evaluate = inner.samples, inner.train, inner.evaluate

    def alone(self, _: Plan) -> str:
        return ""

    def likeness(self, _: Plan) -> object:
        return "all alike"

    def train_at_once(self, plan: Plan, starts: Sequence[Start]) -> list[Trained | TrainingError]:
        raise ConfigError("dropout draws other numbers")


def test_a_known_limit_is_said_in_its_own_words() -> None:
    lines, task, trainers = list[str](), task_of(), list[Any]()

    def place(pairs: Sequence[Pair], widths: Widths) -> Vectorised:
        trainers.extend(Limited(trainer) for trainer, _ in pairs)
        return Vectorised([(trainer, None) for trainer in trainers], widths, 4, lines.append)

    simulation = Simulation(scenario_of(end=End(versions=1)), task, Lines(io.StringIO()), place=place)
    simulation.run()
    assert isinstance(trainers[0], VectorisedTrainer)
    assert lines == ["trained one by one, not vectorised: dropout draws other numbers"]


def test_a_hostile_device_is_trained_alone_beside_others_at_once() -> None:
    lines = list[str]()
    wanted = scenario_of(
        hostile=(Hostile(kind="sign-flip", share=0.25),), sync=True, aggregator={}, end=End(versions=1)
    )
    found, _ = run(wanted, task_of(), 8, lines)
    assert lines == [f"trained one by one, not vectorised: {FOREIGN}"]
    np.testing.assert_allclose(published(found), published(run(wanted, task_of())[0]), atol=1e-4)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"jobs": 0}, "jobs is 0: write a whole number from 1, or ray://HOST:PORT"),
        ({"jobs": "two"}, "jobs is 'two'"),
        ({"jobs": True}, "jobs is True"),
        ({"vectorise": 0}, "vectorise is 0"),
        ({"vectorise": 4, "jobs": "ray://host:10001"}, "a Ray cluster trains each device by itself"),
    ],
)
def test_a_wrong_way_to_compute_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Computation(**given)


@pytest.mark.slow
def test_the_command_trains_at_once_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    simulate = ("lab", "simulate", "--task", "digits", "--devices", 3, "--versions", 1, "--vectorise", 3)
    said = typed(tmp_path, *simulate, "--out", "run")
    assert "updates          3 accepted" in said
    assert "one by one" not in said
    assert "ternbus: a Ray cluster trains each device by itself: leave out vectorise, or name processes" in typed(
        tmp_path, *simulate, "--jobs", "ray://127.0.0.1:1", code=2
    )
    assert "ternbus: jobs is 'two': write a whole number from 1, or ray://HOST:PORT of a Ray cluster" in typed(
        tmp_path, "lab", "simulate", "--jobs", "two", code=2
    )


def test_a_number_of_processes_may_be_text() -> None:
    assert Computation(jobs="2") == Computation(jobs=2)
    assert Computation(jobs="1").elsewhere is False
