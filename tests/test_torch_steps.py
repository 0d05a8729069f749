"""What a task in PyTorch does in its steps: augmentation of each sample, steps of its own, the processor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from support.linear_task import PLAN, Subclass, data, evaluated, linear, same, trained
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge import Metric, Plan, TorchTask, lower, per_sample
from ternbus.edge.learn.task import placed
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.shell import cli
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.preflight import check
from ternbus.edge.torch import device as devices
from ternbus.edge.torch import torchvision_ops  # noqa: F401 - must come before torchvision
from ternbus.edge.torch.augmentation import augmentation

from torchvision.transforms import v2  # isort: skip


class OwnStep(Subclass):
    def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
        return super().train_step(net, batch, plan, optimizers)


class InTorchsManner(Subclass):
    def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
        optimizers.zero_grad()
        loss = functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizers.step()
        return {"loss": loss.item(), "largest": np.float32(1.5)}


PLAIN = TorchTask(name="own", model=linear, data=data)


# -- augmentation


IMAGES = torch.arange(36.0).reshape(1, 1, 6, 6).repeat(40, 1, 1, 1)


def of_images(augment: Any) -> TorchTask:
    return TorchTask(
        name="own",
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 2)),
        data=lambda folder, split: (IMAGES, torch.zeros(40).long()),
        augment=augment,
    )


class OfOne(TorchTask):
    def augment(self, inputs: Any) -> Any:
        assert inputs.shape == (1, 6, 6)
        return inputs.roll(int(torch.randint(0, 6, ())), 2)


class OfAll(TorchTask):
    def augment_batch(self, inputs: Any) -> Any:
        assert inputs.shape == (20, 1, 6, 6)
        return inputs * torch.rand(20, 1, 1, 1)


def seen_by(task: TorchTask) -> list[Tensor]:
    """The batches of a training, as the loss sees them."""
    seen: list[Tensor] = []

    def loss(net: nn.Module, batch: Any, plan: Plan) -> Tensor:
        seen.append(batch[0].clone())
        return functional.cross_entropy(net(batch[0]), batch[1])

    watched = task.replaced(loss=loss)
    trained(watched, Plan(local_steps=2, batch_size=20))
    again = list(seen)
    seen.clear()
    trained(watched, Plan(local_steps=2, batch_size=20))
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
    return seen


def kinds(batch: Tensor) -> int:
    return len({image.numpy().tobytes() for image in batch})


@pytest.mark.parametrize(
    "augment",
    [v2.RandomCrop(6, padding=3), v2.Compose([v2.RandomCrop(6, padding=3)]), per_sample(v2.RandomCrop(6, padding=3))],
)
def test_each_image_of_a_batch_has_a_crop_of_its_own(augment: Any) -> None:
    one, other = seen_by(of_images(augment))
    assert one.shape == (20, 1, 6, 6)
    assert kinds(one) > 5
    assert not torch.equal(one, other)


def test_a_class_augments_one_sample_or_a_batch() -> None:
    arguments = vars(of_images(None))
    one, _ = seen_by(OfOne(**arguments))
    assert kinds(one) > 3
    all_of_them, _ = seen_by(OfAll(**arguments))
    assert kinds(all_of_them) == 20


def test_a_function_that_is_given_augments_a_batch_as_before() -> None:
    batch, _ = seen_by(of_images(lambda inputs: inputs + torch.randn(len(inputs), 1, 1, 1)))
    assert kinds(batch) == 20

    def one_crop(inputs: Tensor) -> Any:
        return v2.RandomCrop(6, padding=3)(inputs)

    whole, _ = seen_by(of_images(one_crop))
    assert kinds(whole) == 1


def test_the_targets_in_a_dict_are_not_augmented() -> None:
    batch = {"values": torch.zeros(4, 2), "labels": torch.arange(4)}
    task = TorchTask(name="own", augment=lambda inputs: {name: each + 1 for name, each in inputs.items()})
    change = augmentation(task)
    assert change is not None
    changed = change(batch)
    assert torch.equal(changed["values"], torch.ones(4, 2))
    assert torch.equal(changed["labels"], torch.arange(4))


def test_nothing_is_augmented_in_an_evaluation() -> None:
    def broken(inputs: Tensor) -> Tensor:
        raise AssertionError

    assert evaluated(of_images(broken)).samples == 40


# -- steps of one's own


class Gan(TorchTask):
    """Numbers of N(3, 0.5), made of noise."""

    def model(self) -> nn.Module:
        generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        critic = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
        return nn.ModuleDict({"generator": generator, "critic": critic})

    def dataset(self, folder: Path | None, split: str) -> Tensor:
        return 3 + 0.5 * torch.randn(400, 1, generator=torch.Generator().manual_seed(len(split)))

    def predict(self, net: Any, batch: Tensor) -> Any:
        return net["generator"](torch.randn(len(batch), 4))

    def optimizers(self, net: Any, plan: Plan) -> Any:
        return {"generator": net["generator"], "critic": net["critic"]}

    def train_step(self, net: Any, batch: Tensor, plan: Plan, optimizers: Any) -> Mapping[str, Any]:
        made = self.predict(net, batch)
        real, false = net["critic"](batch), net["critic"](made.detach())
        of_critic = (functional.softplus(-real) + functional.softplus(false)).mean()
        optimizers["critic"].minimize(of_critic)
        of_generator = functional.softplus(-net["critic"](made)).mean()
        optimizers["generator"].minimize(of_generator)
        return {"loss": of_generator, "critic_loss": of_critic}

    def loss(self, net: Any, batch: Tensor, plan: Plan) -> Any:
        made = self.predict(net, batch)
        return functional.softplus(-net["critic"](made)).mean(), made

    def metrics(self) -> Mapping[str, Metric]:
        return {"mean_error": lower(lambda made, real: abs(made.mean() - real.mean()))}


GAN_PLAN = Plan(local_steps=400, batch_size=50, optimizer="adam", beta1=0.5, learning_rate=0.005)


def test_two_networks_of_a_gan_train_against_each_other() -> None:
    task = Gan()
    assert [problem for problem in check(task).problems if "accuracy" not in problem] == []
    start = task.initial(0)
    found = trained(task, GAN_PLAN)
    assert {name.partition(".")[0] for name in start if not np.array_equal(start[name], found.tensors[name])} == {
        "generator", "critic",
    }  # fmt: skip
    assert set(found.metrics) == {"loss", "critic_loss", "steps", "seconds"}
    before, after = evaluated(task), evaluated(task, found.tensors)
    assert after.better == {"mean_error": "lower"}
    assert after.values["mean_error"] < 0.5 < before.values["mean_error"]
    assert same(found.tensors, trained(task, GAN_PLAN).tensors)


def test_one_network_of_two_can_be_left_as_it_is() -> None:
    class Half(Gan):
        def train_step(self, net: Any, batch: Tensor, plan: Plan, optimizers: Any) -> Any:
            loss = functional.softplus(-net["critic"](self.predict(net, batch))).mean()
            optimizers["generator"].minimize(loss)
            return loss

    start, found = Half().initial(0), trained(Half(), Plan(local_steps=3)).tensors
    changed = [name for name in start if not np.array_equal(start[name], found[name])]
    assert changed
    assert all(name.startswith("generator") for name in changed)


def test_the_owners_limits_and_the_plans_rate_hold_for_steps_of_ones_own() -> None:
    limited = TrainingLimits(steps=7).bound(GAN_PLAN)
    assert trained(Gan(), limited).metrics["steps"] == 7
    hurried = TrainingLimits(seconds=1e-9).bound(GAN_PLAN)
    assert trained(Gan(), hurried).metrics["steps"] == 1
    rates: list[float] = []

    class Watched(OwnStep):
        def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
            rates.append(plan.learning_rate)
            assert optimizers.rate == plan.learning_rate
            return super().train_step(net, batch, plan, optimizers)

    scheduled = Plan(local_steps=2, learning_rate=0.1, schedule="linear", schedule_versions=10)
    for task in (Watched(), PLAIN):
        trainer = task.trainer(data=None, partition="all")
        rates.append(float(trainer.train(task.initial(0), scheduled, version=4, seed=1).tensors["bias"][0]))
    assert rates[:2] == [pytest.approx(0.06)] * 2
    assert rates[2] == rates[3]


def test_an_optimizer_of_torch_may_be_used() -> None:
    class OfTorch(InTorchsManner):
        def optimizers(self, net: nn.Module, plan: Plan) -> Any:
            return torch.optim.SGD(net.parameters(), lr=plan.learning_rate, momentum=plan.momentum)

    found, expected = trained(OfTorch()).tensors, trained(PLAIN).tensors
    assert all(np.allclose(found[name], expected[name], atol=1e-6) for name in found)


@pytest.mark.parametrize("given", [lambda net: [net.weight, net.bias], lambda net: [net], lambda net: net.parameters()])
def test_parameters_are_named_as_a_list_a_module_or_an_iterator(given: Callable[[Any], Any]) -> None:
    class Named(Subclass):
        def optimizers(self, net: nn.Module, plan: Plan) -> Any:
            return given(net)

        def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
            one = optimizers[0] if isinstance(optimizers, list) else optimizers
            return super().train_step(net, batch, plan, one)

    assert same(trained(Named()).tensors, trained(PLAIN).tensors)


def test_what_is_no_optimizer_is_refused() -> None:
    class Wrong(OwnStep):
        def optimizers(self, net: nn.Module, plan: Plan) -> Any:
            return 3

    with pytest.raises(ConfigError, match=r"optimizers\(\) returned int: return modules"):
        trained(Wrong())


# -- processors


def test_a_processor_that_is_not_there_is_named() -> None:
    assert devices.chosen("cpu") == torch.device("cpu")
    for number in (99, 128, 255, 256, 999):  # torch has 8 bits for it
        with pytest.raises(ConfigError, match=f"device is 'cuda:{number}', but this machine has "):
            devices.chosen(f"cuda:{number}")
    with pytest.raises(ConfigError, match="device is 'gpu': it must be auto, cpu, cuda, cuda:N or mps"):
        PLAIN.on_device("gpu")
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match='device is "mps", which this machine does not have'):
            devices.chosen("mps")


def test_the_owners_processor_goes_before_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def chosen(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(devices, "chosen", chosen)
    trained(PLAIN)
    trained(PLAIN.replaced(device="cuda:1"))
    assert asked == ["auto", "cuda:1"]


def test_a_task_is_placed_where_its_owner_says() -> None:
    assert placed(PLAIN, "") is placed(PLAIN, "auto") is PLAIN
    own = placed(PLAIN, "cpu")
    assert isinstance(own, TorchTask)
    assert own.device == "cpu"
    plain = load_task("digits-numpy")
    assert placed(plain, "cpu") is plain
    with pytest.raises(ConfigError, match="the task digits-numpy has no device 'cuda'"):
        placed(plain, "cuda")


def test_a_model_on_another_device_is_another_one_and_what_it_learns_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator: the model moves between the CPU and the CPU by another name."""
    task = TorchTask(name="own", model=lambda: nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)), data=data)
    trainer, start = task.trainer(data=None, partition="all"), task.initial(0)
    expected = trainer.train(start, PLAN, version=0, seed=1).tensors
    monkeypatch.setattr(devices, "chosen", lambda name: torch.device("cpu:0"))
    first = trainer._model
    found = trainer.train(start, PLAN, version=0, seed=1).tensors
    assert trainer._model is not first
    assert same(found, expected)
    assert evaluated(task, found).values == pytest.approx(trainer._task.evaluator(data=None).evaluate(found).values)


def test_a_device_keeps_the_processor_that_its_owner_chose(tmp_path: Path) -> None:
    invitation = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:9", aggregator_key="ab" * 32, code="c" * 32
    )
    home = DeviceDirectory(tmp_path / "pi")
    settings = home.prepare(invitation, task="digits", data=None, partition="all", processor="cpu")
    assert home.settings() == settings
    assert settings.processor == "cpu"
    path = tmp_path / "pi.toml"
    path.write_text(invitation.dumps())
    path.chmod(0o600)
    for task, name, said in (("digits", "gpu", "device is 'gpu'"), ("digits-numpy", "cuda", "has no device 'cuda'")):
        arguments = ["join", str(path), str(tmp_path / "other"), "--task", task, "--device", name]
        assert said in str(CliRunner().invoke(cli.app, arguments).exception)
        assert not (tmp_path / "other").exists()
    arguments = ["join", str(path), str(tmp_path / "pi"), "--renew", "--device", "cpu"]
    assert "--renew keeps task, data" in str(CliRunner().invoke(cli.app, arguments).exception)
