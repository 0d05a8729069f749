"""The data of the tasks in its real layouts: the right rows, upright, by owner; and what is missing is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support import miniatures
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import halves_of
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.tasks import cifar10_data, cifar10_resnet, emnist_62, hapt, idx, mnist_by_writer
from ternbus.edge.torch.trainer import TorchTask, TorchTrainer
from ternbus.lab.scenario.scenario import Scenario


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.write_all(tmp_path_factory.mktemp("data"))


def parameters(name: str) -> int:
    return sum(tensor.size for tensor in load_task(name).initial(0).values())


def test_a_device_has_what_its_writer_wrote_and_all_writers_together_have_everything(folder: Path) -> None:
    owners = mnist_by_writer.owners(folder)
    assert owners[:4].tolist() == [0, 2, 1, 0]  # writers 7, 100, 23 in the order of their numbers
    inputs, labels = mnist_by_writer.data(folder, "train")
    sizes = []
    for number in range(3):
        trainer = mnist_by_writer.TASK.trainer(data=folder, partition=f"natural:{number}")
        own_inputs, own_labels = trainer.data.batch(slice(None))
        assert torch.equal(own_inputs, inputs[owners == number])
        assert torch.equal(own_labels, labels[owners == number])
        sizes.append(trainer.samples)
    assert sum(sizes) == len(inputs)
    with pytest.raises(ConfigError, match="natural:3: the natural devices of these data are numbered 0 to 2"):
        mnist_by_writer.TASK.trainer(data=folder, partition="natural:3")


def test_a_task_without_owners_says_that_it_has_no_natural_devices() -> None:
    with pytest.raises(ConfigError, match="no natural devices"):
        load_task("digits").trainer(data=None, partition="natural:0")
    with pytest.raises(ConfigError, match="no natural devices"):
        load_task("digits-numpy").trainer(data=None, partition="natural:0")


def test_a_scenario_gives_each_device_a_natural_part(folder: Path) -> None:
    scenario = Scenario(task="mnist-by-writer", devices=3, partition="natural", data=folder)
    assert [scenario.partition_of(device) for device in range(3)] == ["natural:0", "natural:1", "natural:2"]


def test_natural_parts_need_no_classes(folder: Path) -> None:
    def data(_: Path | None, __: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(4, 2), torch.zeros(4, 3)

    task = TorchTask(
        name="own", model=lambda: torch.nn.Linear(2, 3), data=data, owners=lambda _: np.array([1, 0, 1, 1])
    )
    assert [trainer.samples for trainer in task.trainers(data=None, partitions=["natural:0", "natural:1"])] == [1, 3]
    assert [task.trainer(data=None, partition=f"iid:{part}/2").samples for part in (0, 1)] == [2, 2]
    with pytest.raises(ConfigError, match="no classes"):
        task.trainer(data=None, partition="dirichlet:1:0/2:0")
    ((trainer, held),) = halves_of(task, None, ["all"], 0.3)
    assert (trainer.samples, held.samples) == (3, 1)
    ((trainer, held),) = halves_of(task, None, ["natural:1"], 0.3)
    assert (trainer.samples, held.samples) == (2, 1)
    short = TorchTask(name="own", model=task.model, data=data, owners=lambda _: np.array([0]))
    with pytest.raises(ConfigError, match="1 owners of 4 samples"):
        short.trainer(data=None, partition="natural:0")


def test_thirty_people_train_on_the_beginning_of_each_activity_and_are_tested_on_its_end(folder: Path) -> None:
    (train, labels), (test, test_labels) = hapt.data(folder, "train"), hapt.data(folder, "test")
    people = hapt.owners(folder)
    assert sorted(set(people.tolist())) == list(range(30))
    assert (len(train), len(test)) == (30 * 6 * 7, 30 * 6 * 2)  # of ten windows the eighth overlaps with the ninth
    assert (train.shape[1:], train.dtype, labels.dtype) == ((6, 128), torch.float32, torch.int64)
    place = test[:, 0, 0].long()  # each window's in its person's sixty
    assert torch.equal(place // 10, test_labels)
    assert sorted(set((place % 10).tolist())) == [8, 9]
    assert sorted(set((train[:, 0, 0].long() % 10).tolist())) == list(range(7))


def test_of_nine_people_nobody_trains_on_a_window(folder: Path) -> None:
    (train, _), (test, _) = hapt.unseen_data(folder, "train"), hapt.unseen_data(folder, "test")
    assert (len(train), len(test)) == (21 * 60, 9 * 60)
    people = hapt.unseen_owners(folder)
    assert (len(people), sorted(set(people.tolist()))) == (21 * 60, list(range(21)))
    with np.load(folder / hapt.FILE) as file:
        second = np.flatnonzero(file["subject"] == 3)  # 1 is 0, 2 is not there, 3 is 1
        np.testing.assert_array_equal(
            train[people == 1].numpy(), file["x"][second].astype(np.float32).transpose(0, 2, 1)
        )


def test_emnists_test_part_is_split_stratified_and_stands_upright(folder: Path) -> None:
    (train, labels), (test, test_labels) = emnist_62.data(folder, "train"), emnist_62.data(folder, "test")
    assert np.bincount(labels).tolist() == [4] * 62
    assert np.bincount(test_labels).tolist() == [1] * 62
    label = int(test_labels[7])
    row = 2 * (label % 10) + 3
    assert (test[7, 0, row, : 8 + 2 * (label // 10)] == 255).all()
    assert train.shape == (248, 1, 28, 28)


def test_the_whole_of_emnist_is_taken_as_it_is_split_by_nist(tmp_path: Path) -> None:
    (tmp_path / "emnist").mkdir()
    for part, samples in (("train", 6), ("test", 4)):
        labels = np.arange(samples, dtype=np.uint8)
        for kind, array in (("images-idx3", miniatures.images(labels)), ("labels-idx1", labels)):
            (tmp_path / "emnist" / f"emnist-byclass-{part}-{kind}-ubyte").write_bytes(miniatures.idx_bytes(array))
    assert emnist_62.data(tmp_path, "train")[1].tolist() == list(range(6))
    assert emnist_62.data(tmp_path, "test")[1].tolist() == list(range(4))


def test_cifar10s_rows_are_read_as_colours_and_the_model_sees_them_normalized(folder: Path) -> None:
    images, labels = cifar10_data.data(folder, "train")
    assert (images.shape, images.dtype, len(labels)) == ((100, 3, 32, 32), torch.uint8, 100)
    assert images[0, :, 3, 0].tolist() == [127, 255, 255]
    white = cifar10_data.normalize()(torch.ones(1, 3, 1, 1)).flatten()
    expected = [
        (1 - mean) / deviation for mean, deviation in zip(cifar10_data.MEAN, cifar10_data.DEVIATION, strict=True)
    ]
    assert white.tolist() == pytest.approx(expected)


def test_each_image_of_a_batch_is_cropped_and_flipped_for_itself() -> None:
    image = torch.zeros(3, 32, 32)
    image[:, 16, 10] = 1  # a point, to see where it goes
    torch.manual_seed(0)
    batch = cifar10_data.crop_and_flip(image.expand(400, 3, 32, 32))
    assert batch.shape == (400, 3, 32, 32)
    assert batch.sum((1, 2, 3)).tolist() == [3] * 400
    _, rows, columns = np.nonzero(batch[:, 0].numpy())
    assert set(rows) == set(range(12, 21))  # up to 4 up or down
    assert set(columns) == set(range(6, 15)) | set(range(17, 26))  # and to the sides, half of them seen in a mirror
    assert 150 < int((columns > 15).sum()) < 250


def test_the_first_layer_of_the_resnet_takes_patches_apart_and_loses_nothing() -> None:
    layer = cifar10_resnet.Whitening()
    filters = layer.filters[:12].reshape(12, 12)
    apart = filters * torch.tensor(cifar10_resnet.DEVIATIONS)[:, None]
    torch.testing.assert_close(apart @ apart.T, torch.eye(12))
    images = torch.rand(5, 3, 32, 32)
    seen = layer(images)
    assert seen.shape == (5, 24, 31, 31)
    torch.testing.assert_close(seen[:, :12], -seen[:, 12:])


def test_the_resnet_takes_an_image_for_what_it_takes_its_mirror_image() -> None:
    torch.manual_seed(0)
    network = cifar10_resnet.model()
    nn.init.normal_(network.get_parameter("network.10.weight"))  # it begins at nothing
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), network(images.flip(3)))
        assert not torch.allclose(network.train()(images), network(images.flip(3)))


def test_the_models_are_of_the_size_that_they_say() -> None:
    assert parameters("mnist-by-writer") == 106_122
    assert parameters("hapt") == parameters("hapt-unseen") == 19_590
    assert round(parameters("cifar10-cnn") / 1e6, 1) == 4.3
    assert parameters("cifar10-resnet") == 926_314


NEEDED = [
    ("mnist-by-writer", "MNIST/raw", "train-images-idx3-ubyte"),
    ("emnist-62", "emnist", "emnist-byclass-test-images-idx3-ubyte"),
    ("hapt", "hapt", "hapt_windows_128x6_f16.npz"),
    ("hapt-unseen", "hapt", "hapt_windows_128x6_f16.npz"),
    ("cifar10-cnn", "cifar-10-batches-bin", "data_batch_1.bin"),
    ("cifar10-resnet", "cifar-10-batches-bin", "data_batch_1.bin"),
]


@pytest.mark.parametrize(("name", "place", "file"), NEEDED)
def test_missing_data_are_said_with_the_place_where_they_are_looked_for(
    name: str, place: str, file: str, tmp_path: Path
) -> None:
    task = load_task(name)
    with pytest.raises(ConfigError, match=r"--data DIR.*DIR/" + place):
        task.trainer(data=None, partition="all")
    with pytest.raises(ConfigError) as caught:
        task.trainer(data=tmp_path, partition="all")
    assert str(tmp_path / place) in str(caught.value)
    assert file in str(caught.value)


def test_of_a_fine_tuned_network_only_the_head_travels_and_only_it_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("cifar10-finetune")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"no checkpoint {tmp_path}/hub/checkpoints/mobilenet_v3_small-\w+.pth"):
        task.initial(0)
    miniatures.write_checkpoint(tmp_path)
    start = task.initial(0)
    assert {name.partition(".")[0] for name in start} == {"5"}
    assert sum(tensor.size for tensor in start.values()) == 150_282
    trainer = task.trainer(data=folder, partition="all")
    assert isinstance(trainer, TorchTrainer)
    frozen = trainer._model.get_submodule("2")
    body = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    trained = trainer.train(start, Plan(local_steps=2, batch_size=8), version=0, seed=0).tensors
    assert not any(np.array_equal(start[name], trained[name]) for name in start)
    assert all(torch.equal(body[name], tensor) for name, tensor in frozen.state_dict().items())
    (checkpoint,) = (tmp_path / "hub" / "checkpoints").iterdir()
    checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match=checkpoint.name):
        task.initial(0)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def made_up(path: Path) -> None:
    path.write_bytes(b"this is no dataset at all")


@pytest.mark.parametrize("spoil", [cut_short, made_up])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist-by-writer", "MNIST/raw/train-labels-idx1-ubyte"),
        ("emnist-62", "emnist/emnist-byclass-test-images-idx3-ubyte.gz"),
        ("hapt", "hapt/hapt_windows_128x6_f16.npz"),
        ("cifar10-cnn", "cifar-10-batches-bin/data_batch_3.bin"),
    ],
)
def test_a_damaged_file_is_named(name: str, file: str, spoil: Callable[[Path], None], tmp_path: Path) -> None:
    miniatures.write_all(tmp_path / "data")
    spoil(tmp_path / "data" / file)
    with pytest.raises(ConfigError) as caught:
        load_task(name).trainer(data=tmp_path / "data", partition="all")
    assert str(tmp_path / "data" / file) in str(caught.value)


def test_idx_numbers_come_in_this_machines_byte_order(tmp_path: Path) -> None:
    array = np.array([[1, 70_000], [-3, 4]], np.int32)
    (tmp_path / "some").write_bytes(miniatures.idx_bytes(array))
    found = idx.read(tmp_path, "some")
    assert found.dtype == np.int32
    assert found.tolist() == array.tolist()


def test_a_window_is_turned_and_scaled_as_a_whole() -> None:
    torch.manual_seed(0)
    windows = torch.randn(50, 6, 128)
    bent = hapt.rotate_and_scale(windows)
    for first in (0, 3):  # acceleration, rotation
        lengths = [torch.linalg.vector_norm(each[:, first : first + 3], dim=1) for each in (windows, bent)]
        factor = lengths[1] / lengths[0]
        assert torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-4)  # over time: a rotation keeps lengths
        assert factor[:, 0].std() == pytest.approx(hapt.SCALE, rel=0.4)
    directions = torch.nn.functional.cosine_similarity(windows[:, :3], bent[:, :3], dim=1)
    assert 0.8 < directions.mean() < 0.99


def test_an_image_is_bent_a_little_and_for_itself() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 28, 28)
    image[:, :, 10:18, 13:15] = 1.0
    bent = mnist_by_writer.random_affine(image.repeat(20, 1, 1, 1))
    assert bent.shape == (20, 1, 28, 28)
    assert 0 <= bent.min() <= bent.max() <= 1.0 + 1e-6
    assert len({each.numpy().tobytes() for each in bent}) == 20
    assert bent.sum((1, 2, 3)).numpy() == pytest.approx(16.0, rel=0.5)  # none has left the image
    middle = (bent * torch.arange(28.0)).sum((1, 2, 3)) / bent.sum((1, 2, 3))
    assert 0.3 < middle.std() < 3


def test_the_summary_of_the_first_channels_stands_first() -> None:
    """So that a narrower network's last layer is a corner of the whole one's."""
    channels = torch.randn(4, 8, 20)
    assert torch.equal(hapt.Summary()(channels)[:, :12], hapt.Summary()(channels[:, :4]))


def test_a_spectrum_says_how_strong_each_band_is_whatever_the_windows_mean() -> None:
    """A sine of amplitude A within one bin has a mean power that any FFT agrees on: here numpy's, written out."""
    time = np.arange(hapt.WINDOW) / 50  # s
    windows = np.zeros((2, 6, hapt.WINDOW), np.float32)
    windows[:, 0] = 0.02 * np.sin(2 * np.pi * (7 * 50 / hapt.WINDOW) * time)  # the band of bins 6 and 7
    windows[:, 1] = [[1.0], [-3.0]]  # gravity, which is none of its business
    found = hapt.Spectrum()(torch.from_numpy(windows)).reshape(2, 8, len(hapt.BANDS) - 1)
    power = np.abs(np.fft.rfft(windows[0, 0] * np.hanning(hapt.WINDOW))) ** 2 / hapt.WINDOW
    expected = [np.log(power[a:b].mean() + hapt.FAINT) for a, b in zip(hapt.BANDS, hapt.BANDS[1:], strict=False)]
    assert found[0, 0].numpy() == pytest.approx(np.array(expected), abs=1e-3)
    assert int(found[0, 0].argmax()) == hapt.BANDS.index(6)
    assert torch.allclose(found[0, :6], found[1, :6], atol=1e-4)
    assert found[:, 2:6].numpy() == pytest.approx(np.log(hapt.FAINT))  # silence


def test_a_window_is_judged_by_itself_and_not_by_those_beside_it() -> None:
    """No person's windows may change what becomes of another's, also while it is trained: no batch norm."""
    net = hapt.model()
    net.get_submodule("1").eval()  # dropout draws for each window
    torch.manual_seed(0)
    windows = torch.randn(8, 6, hapt.WINDOW)
    others = torch.cat([windows[:1], 5 * windows[1:] + 2])
    assert net.training
    assert torch.allclose(net(windows)[0], net(others)[0], atol=1e-5)
    assert not torch.allclose(net(windows)[1], net(others)[1], atol=1e-1)


def test_what_every_width_has_stands_first_before_the_last_layer() -> None:
    """The spectrum has no channels to cut; after them it would meet other weights in a narrower network."""
    windows = torch.randn(4, 6, hapt.WINDOW)
    whole, half = (hapt.model(width).get_submodule("0")(windows) for width in (1.0, 0.5))
    assert (whole.shape[1], half.shape[1]) == (104 + 144, 104 + 72)
    assert torch.equal(whole[:, :104], half[:, :104])
