"""Every task that ships learns, leaves what it was given alone, and does the same again for the same seed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support import miniatures
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import Task, TrainingError
from ternbus.edge.learn.task_loader import BUILT_IN_TASKS, load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.tasks import cifar10_features, digits_data, movie_reviews
from ternbus.edge.torch.trainer import TorchTask

NAMES = tuple(BUILT_IN_TASKS)
DRAW_NOTHING = {  # they begin with what is known, or with zeros
    "cifar10-features", "digits-linear", "reviews-ffa-lora", "reviews-head", "reviews-full",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tasks begin with that have learned before: a checkpoint, a network for features, a language model."""
    minilm = miniatures.write_minilm(tmp_path_factory.mktemp("minilm") / "model")
    home = tmp_path_factory.mktemp("torch")
    miniatures.write_checkpoint(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        patch.setattr(cifar10_features, "Body", miniatures.Body)
        patch.setattr(movie_reviews, "_folder", lambda: minilm)
        yield


def same(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def read_only(tensors: Tensors) -> Tensors:
    """As the follower hands them over: views of a vector that must not change."""
    for tensor in tensors.values():
        tensor.setflags(write=False)
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_a_task_learns_and_repeats_itself_and_leaves_its_start_alone(name: str, folder: Path) -> None:
    task = load_task(name)
    start = read_only(task.initial(1))
    before = {key: tensor.copy() for key, tensor in start.items()}
    trainer = task.trainer(data=folder, partition="dirichlet:10:0/2:1")
    large = name.startswith(("cifar10", "reviews"))
    plan = Plan.from_meta(
        {**task.default_plan, **({"local_steps": 5, "batch_size": 16} if large else {"local_epochs": 4})}
    )
    trained = trainer.train(start, plan, version=3, seed=5)
    assert same(start, before)
    assert all(tensor.dtype == np.float32 for tensor in trained.tensors.values())
    assert {key: tensor.shape for key, tensor in trained.tensors.items()} == {k: t.shape for k, t in start.items()}
    assert trained.samples == trainer.samples
    assert set(trained.metrics) == {"loss", "accuracy", "seconds", "steps"}
    first, after = trainer.evaluate(start), trainer.evaluate(trained.tensors)
    assert after.samples == trainer.samples
    assert after.values["loss"] < first.values["loss"] or large  # after five steps the statistics are not there yet
    again = trainer.train(start, plan, version=3, seed=5)
    assert same(trained.tensors, again.tensors)
    assert not same(trained.tensors, trainer.train(start, plan, version=3, seed=6).tensors)


@pytest.mark.parametrize("name", NAMES)
def test_the_initial_model_depends_on_the_seed_alone(name: str) -> None:
    task = load_task(name)
    assert same(task.initial(1), task.initial(1))
    assert same(task.initial(1), task.initial(2)) == (name in DRAW_NOTHING)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_plan_is_a_plan_with_nothing_unknown_in_it(name: str) -> None:
    assert not Plan.from_meta(load_task(name).default_plan).extra


@pytest.mark.parametrize("name", ["digits", "digits-numpy"])
def test_a_strong_proximal_term_keeps_the_model_near_its_start(name: str) -> None:
    """FedProx: the pull towards the start grows with mu."""
    task = load_task(name)
    start, trainer = task.initial(0), task.trainer(data=None, partition="iid:0/8")

    def moved(mu: float) -> float:
        plan = Plan(local_epochs=2, batch_size=16, learning_rate=0.02, proximal_mu=mu)
        tensors = trainer.train(start, plan, version=0, seed=0).tensors
        return sum(float(np.square(tensors[key] - start[key]).sum()) for key in start)

    assert moved(20) < moved(1) < moved(0)


@pytest.mark.parametrize("name", ["digits", "digits-numpy"])
def test_training_that_diverges_is_an_error_of_its_own(name: str) -> None:
    task = load_task(name)
    plan = Plan(local_epochs=5, learning_rate=1000.0, weight_decay=1000.0)
    with pytest.raises(TrainingError, match="learning_rate"):
        task.trainer(data=None, partition="iid:0/8").train(task.initial(0), plan, version=0, seed=0)


def test_the_digits_models_are_of_the_size_that_they_say() -> None:
    tensors = load_task("digits").initial(0)
    assert 35_000 <= sum(tensor.size for tensor in tensors.values()) <= 45_000
    assert sum(tensor.size for tensor in tensors.values() if tensor.size < 256) <= 122
    assert sum(tensor.size for tensor in load_task("digits-linear").initial(0).values()) == 650


def test_the_digits_test_set_is_a_stratified_fifth_that_nobody_trains_on() -> None:
    (train, train_labels), (test, test_labels) = digits_data.load("train"), digits_data.load("test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.dtype == test.dtype == np.float32
    assert (train.min(), train.max()) == (0.0, 1.0)
    assert (
        np.abs(np.bincount(test_labels) / np.bincount(np.concatenate([train_labels, test_labels])) - 0.2).max() < 0.003
    )


def test_missing_fashion_mnist_says_where_it_is_looked_for(tmp_path: Path) -> None:
    task = load_task("fashion-mnist")
    with pytest.raises(ConfigError, match="--data DIR"):
        task.trainer(data=None, partition="all")
    with pytest.raises(ConfigError, match=f"{tmp_path}/FashionMNIST/raw"):
        task.evaluator(data=tmp_path)


@pytest.mark.parametrize("name", ["digits-numpy", "digits-linear"])
def test_the_numpy_gradient_is_that_of_the_loss(name: str) -> None:
    """Against central differences in float64, element by element."""
    from ternbus.edge.tasks.digits_numpy import _backward  # noqa: PLC0415 - only this test looks inside

    weights = {key: tensor.astype(np.float64) for key, tensor in load_task(name).initial(0).items()}
    images, labels = digits_data.load("train")
    images, labels = images[:20].astype(np.float64), labels[:20]

    def loss() -> float:
        return _backward(weights, images, labels)[0] / len(labels)  # type: ignore[arg-type]

    _, _, gradients = _backward(weights, images, labels)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for key, weight in weights.items():
        for position in rng.choice(weight.size, 10):
            kept, step = weight.flat[position], 1e-6
            weight.flat[position] = kept + step
            above = loss()
            weight.flat[position] = kept - step
            below = loss()
            weight.flat[position] = kept
            assert gradients[key].flat[position] == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-7)


def test_sgd_in_torch_is_that_of_torch_optim() -> None:
    task = load_task("digits")
    assert isinstance(task, TorchTask)
    start, plan = (
        task.initial(0),
        Plan(local_steps=4, batch_size=32, momentum=0.9, weight_decay=1e-3, learning_rate=0.1),
    )
    linear = TorchTask(name="linear", model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data=task.data)
    start = linear.initial(0)
    trainer = linear.trainer(data=None, partition="all")
    ours = trainer.train(start, plan, version=0, seed=3).tensors
    model = linear.model()
    model.load_state_dict({key: torch.tensor(tensor) for key, tensor in start.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    inputs, targets = task.data(None, "train")
    for chosen in plan.batches(len(inputs), np.random.default_rng(3)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    for key, tensor in model.state_dict().items():
        np.testing.assert_allclose(ours[key], tensor.numpy(), atol=1e-6)


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 10)
    )


def test_float_buffers_travel_and_counters_do_not_and_augmentation_is_seeded() -> None:
    def noisy(inputs: torch.Tensor) -> torch.Tensor:
        return inputs + 0.1 * torch.randn_like(inputs)

    digits = load_task("digits")
    assert isinstance(digits, TorchTask)
    task: Task = TorchTask(name="own", model=with_batch_norm, data=digits.data, augment=noisy)
    start = task.initial(0)
    assert "2.running_mean" in start
    assert "2.num_batches_tracked" not in start
    trainer = task.trainer(data=None, partition="iid:0/8")
    one = trainer.train(start, Plan(), version=0, seed=1).tensors
    state = torch.get_rng_state()
    assert same(one, trainer.train(start, Plan(), version=0, seed=1).tensors)
    assert torch.equal(state, torch.get_rng_state())
    assert not np.array_equal(one["2.running_mean"], start["2.running_mean"])


def test_the_demo_without_torch_imports_no_torch_and_stays_small() -> None:
    """Trains digits-numpy beside all that an agent imports, in a process of its own: under 60 MB resident."""
    program = """
import sys, msgpack, nacl.public, nacl.signing, paho.mqtt.client, xxhash, zstandard
from ternbus.edge.learn import partition, terngrad
from ternbus.edge.plan.plan import Plan
from ternbus.edge.learn.task_loader import load_task
task = load_task("digits-numpy")
trainer = task.trainer(data=None, partition="dirichlet:0.5:0/8:1")
trainer.train(task.initial(0), Plan.from_meta(task.default_plan), version=0, seed=0)
assert not [name for name in sys.modules if name.startswith("torch")]
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    print(f"resident at most: {int(ran.stdout) / 1024:.0f} MB")
    assert int(ran.stdout) < 60 * 1024
