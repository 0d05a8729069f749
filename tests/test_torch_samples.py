"""The forms of data that a task in PyTorch takes: the same samples train the same model, and faults are in words."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ternbus.broker.errors import ConfigError
from ternbus.edge import Plan, TorchTask, TrainingError
from ternbus.edge.learn.task import halves_of
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch.samples import TensorSamples

SAMPLES = 90
PLAN = Plan(local_epochs=2, batch_size=16, learning_rate=0.1)
DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(SAMPLES, 8, generator=DRAW)
TARGETS = torch.arange(SAMPLES) % 3


def task_of(given: Any, **arguments: Any) -> TorchTask:
    return TorchTask(name="own", model=lambda: nn.Linear(8, 3), data=lambda folder, split: given, **arguments)


def trained(given: Any, partition: str = "all", **arguments: Any) -> Tensors:
    task = task_of(given, **arguments)
    return task.trainer(data=None, partition=partition).train(task.initial(0), PLAN, version=0, seed=1).tensors


def same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


class Items(Dataset[Any]):
    """A map-style Dataset that reads an item when it is asked for."""

    def __init__(self, first: int = 0, last: int = SAMPLES) -> None:
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, number: int) -> Any:
        return INPUTS[self.first + number], int(TARGETS[self.first + number])


class Unrelated:
    """As of a library that has no Dataset of torch; what it holds is not what it gives."""

    def __init__(self) -> None:
        self.all = torch.zeros(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> Any:
        return {"features": INPUTS[number].numpy(), "label": int(TARGETS[number])}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(INPUTS, TARGETS, strict=True)


class Table:
    """As a DataFrame of pandas, whose columns may have any types."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def to_numpy(self) -> Any:
        return np.stack([np.asarray(self._columns[name], object) for name in self.columns], 1)


class Column:
    def __init__(self, values: Any) -> None:
        self._values = values

    def to_numpy(self) -> Any:
        return self._values


class Pair(NamedTuple):
    inputs: Any
    targets: Any


TABLE = Table({f"x{number}": INPUTS[:, number].double().numpy() for number in range(8)})


@pytest.mark.parametrize(
    "given",
    [
        (INPUTS.numpy(), TARGETS.numpy()),
        (INPUTS.double().numpy(), TARGETS.to(torch.int32).numpy()),
        (INPUTS.numpy()[::-1][::-1], TARGETS.numpy().astype(">i8")),
        [INPUTS, TARGETS],
        Pair(INPUTS, TARGETS),
        (TABLE, Column(TARGETS.numpy().astype(np.uint16))),
        TensorDataset(INPUTS, TARGETS),
        Items(),
        DataLoader(Items(), batch_size=7, shuffle=True),
        DataLoader(Items(), batch_size=None),
        (np.ma.masked_array(INPUTS.numpy(), mask=False), TARGETS),
        list(zip(INPUTS, TARGETS, strict=True)),
    ],
    ids=[
        "arrays",
        "other types",
        "strides",
        "a list",
        "a named tuple",
        "a table",
        "TensorDataset",
        "Dataset",
        "DataLoader",
        "DataLoader-of-samples",
        "masked-without-mask",
        "a list of samples",
    ],
)
def test_the_same_samples_in_any_form_train_the_same_model(given: Any) -> None:
    assert same(trained(given), trained((INPUTS, TARGETS)))
    assert same(trained(given, "dirichlet:1:1/3:0"), trained((INPUTS, TARGETS), "dirichlet:1:1/3:0"))
    evaluated = task_of(given).evaluator(data=None).evaluate(task_of(given).initial(0))
    expected = task_of((INPUTS, TARGETS)).evaluator(data=None).evaluate(task_of(given).initial(0))
    assert evaluated.samples == SAMPLES
    assert evaluated.values == pytest.approx(expected.values)


def test_a_dataset_of_tensors_is_its_tensors_and_serves_privacy_of_samples() -> None:
    pair = task_of(TensorDataset(INPUTS, TARGETS)).evaluator(data=None).data
    assert isinstance(pair, TensorSamples)
    assert pair.at_random
    assert isinstance(task_of(TensorDataset(INPUTS)).evaluator(data=None).data.batch(slice(0, 2)), Tensor)
    own = task_of(TensorDataset(INPUTS, TARGETS), collate=lambda samples: samples).evaluator(data=None).data
    assert not own.at_random


def test_a_data_frame_is_taken() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({f"x{number}": INPUTS[:, number].numpy() for number in range(8)})
    frame["y"] = TARGETS.numpy()
    given = (frame.drop(columns="y"), frame["y"])
    assert same(trained(given), trained((INPUTS, TARGETS)))
    frame["city"] = "Bern"
    with pytest.raises(ConfigError, match=r"the column 'city' of the data is of the type .*: it must hold numbers"):
        trained((frame.drop(columns="y"), frame["y"]))


def test_processes_read_a_dataset_and_train_the_same_model() -> None:
    assert same(trained(Items(), workers=2), trained(Items()))


class Named(nn.Linear):
    def forward(self, features: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]  # named arguments
        return super().forward(features)


def test_samples_that_are_dicts_have_their_targets_by_name() -> None:
    task = TorchTask(name="own", model=lambda: Named(8, 3), data=lambda folder, split: Unrelated())
    found = task.trainer(data=None, partition="iid:1/3").train(task.initial(0), PLAN, version=0, seed=1)
    assert same(found.tensors, trained((INPUTS, TARGETS), "iid:1/3"))


# -- streams


def test_an_object_that_can_be_iterated_is_a_stream_whatever_it_holds() -> None:
    class Own:
        def __init__(self) -> None:
            self.held = torch.zeros(3)

        def __iter__(self) -> Iterator[Any]:
            return iter(Stream())

    assert same(trained(Own()), trained(Stream()))


def test_a_stream_is_read_in_its_own_order_again_and_again() -> None:
    assert Plan(local_steps=2, batch_size=70).steps(SAMPLES) == 2  # the second begins in the first pass
    trainer = task_of(Stream()).trainer(data=None, partition="all")
    seen = [batch[0] for batch in trainer.data.batches([np.arange(70), np.arange(70)])]
    assert torch.equal(torch.cat(seen), torch.cat([INPUTS, INPUTS])[:140])
    assert trainer.samples == SAMPLES


def test_parts_of_a_stream_are_those_of_tensors() -> None:
    for partition in ("iid:0/4", "iid:3/4", "dirichlet:1:1/3:0", "iid:1/2;test:0.25"):
        streamed, known = (
            task_of(given).trainer(data=None, partition=partition).data for given in (Stream(), (INPUTS, TARGETS))
        )
        (found,), (expected,) = streamed.in_order(SAMPLES), known.in_order(SAMPLES)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    ((rest, held),) = halves_of(task_of(Stream()), None, ["iid:0/2"], 0.2)
    assert (rest.samples, held.samples) == (36, 9)


class Sharded(IterableDataset[Any]):
    """Each process reads its own share, as PyTorch asks for."""

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        mine = slice(None) if info is None else slice(info.id, None, info.num_workers)
        yield from zip(INPUTS[mine], TARGETS[mine], strict=True)


def test_processes_read_a_stream_and_each_sample_comes_once() -> None:
    (found,) = task_of(Sharded(), workers=2).trainer(data=None, partition="all").data.in_order(1000)
    assert sorted(found[0][:, 0].tolist()) == sorted(INPUTS[:, 0].tolist())


def test_a_stream_cannot_be_read_twice_where_it_ends_for_good() -> None:
    class Once(IterableDataset[Any]):
        left = iter([(INPUTS[0], TARGETS[0])] * 3)

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Any]:
            return self.left

    task = task_of(Once())
    with pytest.raises(TrainingError, match="empty the second time: its __iter__ must begin again"):
        task.trainer(data=None, partition="all").train(task.initial(0), PLAN, version=0, seed=1)
    with pytest.raises(ConfigError, match="a generator, which gives its samples only once"):
        task_of(each for each in [(INPUTS[0], TARGETS[0])]).trainer(data=None, partition="all")


# -- devices that share their data


def tree_of(trainer: Any) -> tuple[Tensor, Tensor]:
    assert isinstance(trainer.data, TensorSamples)
    tree: tuple[Tensor, Tensor] = trainer.data.tree
    return tree


@pytest.mark.parametrize("kind", ["iid:{}/6", "dirichlet:1:{}/6:0"])
def test_the_parts_of_many_devices_are_one_array_in_memory(kind: str) -> None:
    inputs, targets = INPUTS.numpy().copy(), TARGETS.numpy().copy()
    task = task_of((inputs, targets))
    trainers = task.trainers(data=None, partitions=[kind.format(part) for part in range(6)])
    for trainer in trainers:
        assert np.shares_memory(tree_of(trainer)[0].numpy(), inputs)
        assert np.shares_memory(tree_of(trainer)[1].numpy(), targets)
    rows = [trainer.data.batch(slice(None))[0] for trainer in trainers]
    assert sorted(torch.cat(rows)[:, 0].tolist()) == sorted(INPUTS[:, 0].tolist())


def test_an_array_that_is_mapped_from_a_file_stays_in_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "inputs.npy", INPUTS.numpy())
    mapped = np.load(tmp_path / "inputs.npy", mmap_mode="r")
    trainer = task_of((mapped, TARGETS)).trainer(data=None, partition="iid:0/3")
    assert np.shares_memory(tree_of(trainer)[0].numpy(), mapped)
    assert same(trained((mapped, TARGETS)), trained((INPUTS, TARGETS)))


def test_a_model_that_changes_its_inputs_in_place_does_not_change_the_data() -> None:
    inputs = INPUTS.clone()
    task = task_of((inputs, TARGETS)).replaced(model=lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3)))
    start = task.initial(0)
    trainer, evaluator = task.trainer(data=None, partition="all"), task.evaluator(data=None)
    first = evaluator.evaluate(start)
    trainer.train(start, PLAN, version=0, seed=0)
    assert torch.equal(inputs, INPUTS)
    assert evaluator.evaluate(start) == first


def test_owners_have_labels_of_any_kind() -> None:
    names = np.array(["Zoe", "Ann", "Mia"])[np.arange(SAMPLES) % 3]
    for owners in (names, names.tolist(), np.array([700, 5, 9])[np.arange(SAMPLES) % 3], [2, 0, 1] * 30):
        task = task_of((INPUTS, TARGETS), owners=lambda folder, owners=owners: owners)
        trainers = task.trainers(data=None, partitions=[f"natural:{number}" for number in range(3)])
        found = [trainer.data.batch(slice(None))[0] for trainer in trainers]
        assert [rows[0, 0] for rows in found] == [INPUTS[1, 0], INPUTS[2, 0], INPUTS[0, 0]]


# -- samples of different lengths


@dataclass
class Sentence:
    words: Tensor
    lengths: Tensor


class Bag(nn.Module):
    """The mean of the embeddings of a sentence's words, without those that fill it up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(20, 6), nn.Linear(6, 2)

    def forward(self, sentence: Sentence) -> Tensor:
        there = torch.arange(sentence.words.shape[1]) < sentence.lengths[:, None]
        summed = (self.embedding(sentence.words) * there[..., None]).sum(1)
        outputs: Tensor = self.last(summed / sentence.lengths[:, None])
        return outputs


def padded(samples: Any) -> Any:
    words = [words for words, _ in samples]
    lengths = torch.tensor([len(each) for each in words])
    return Sentence(pad_sequence(words, batch_first=True), lengths), torch.tensor([label for _, label in samples])


def test_sentences_of_different_lengths_train_with_a_collate() -> None:
    draw = torch.Generator().manual_seed(3)
    sentences = [torch.randint(0, 20, (1 + number % 7,), generator=draw) for number in range(60)]
    samples = [(words, int((words < 10).float().mean() > 0.5)) for words in sentences]
    task = TorchTask(name="own", model=Bag, data=lambda folder, split: samples, collate=padded)
    trainer, start = task.trainer(data=None, partition="all"), task.initial(0)
    trained = trainer.train(start, Plan(local_epochs=40, batch_size=10, learning_rate=0.2), version=0, seed=1)
    assert trainer.evaluate(trained.tensors).values["accuracy"] > 0.9
    without = TorchTask(name="own", model=Bag, data=lambda folder, split: samples)
    with pytest.raises(TrainingError, match=r"10 samples make no batch: .*samples of different shapes need collate"):
        without.trainer(data=None, partition="all").train(start, Plan(batch_size=10), version=0, seed=1)


# -- faults


class Failing(Items):
    def __getitem__(self, number: int) -> Any:
        if number == 17:
            raise self.error
        return super().__getitem__(number)

    error: BaseException = ValueError("a broken image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named_with_the_line_that_failed(workers: int) -> None:
    line = Failing.__getitem__.__code__.co_firstlineno + 2
    said = rf"sample 17 of the data .*: a bug in the task: test_torch_samples.py, line {line}: ValueError: a broken"
    with pytest.raises(TrainingError, match=said):
        trained(Failing(), workers=workers)
    task = task_of(Failing(), workers=workers)
    evaluator, start = task.evaluator(data=None), task.initial(0)
    with pytest.raises(TrainingError, match=said):
        evaluator.evaluate(start)
    with pytest.raises(ConfigError, match=said):
        task.trainer(data=None, partition="dirichlet:1:0/2:0")


@pytest.mark.parametrize("error", [SystemExit("enough"), MemoryError(), FileNotFoundError(2, "No such file", "a.png")])
def test_whatever_a_sample_raises_is_in_words(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "error", error)
    said = {"SystemExit": "sys.exit", "MemoryError": "out of memory", "FileNotFoundError": "missing data: a.png"}
    with pytest.raises(TrainingError, match=rf"sample 17 of the data cannot be read: .*{said[type(error).__name__]}"):
        trained(Failing())


def test_a_stream_that_fails_is_named_before_a_training() -> None:
    class Broken(Stream):
        def __iter__(self) -> Iterator[Any]:
            yield INPUTS[0], TARGETS[0]
            raise ValueError("odd")

    with pytest.raises(ConfigError, match=r"the task own: the data cannot be read: .*line \d+: ValueError: odd"):
        task_of(Broken()).trainer(data=None, partition="all")


class Endless(Dataset[Any]):
    def __getitem__(self, number: int) -> Any:
        return INPUTS[0], TARGETS[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((INPUTS, TARGETS[:80]), "the task own has 90 inputs and 80 targets in this part: it must have equal numbers"),
        ((INPUTS[:0], TARGETS[:0]), "has 0 inputs and 0 targets in this part"),
        (({"a": INPUTS, "b": INPUTS[:7]}, TARGETS), r"tensors of shapes \(90, 8\), \(7, 8\), \(90,\)"),
        ((INPUTS, torch.tensor(3)), "each must have a row for each sample"),
        ((INPUTS, None), "the data have NoneType in place of a tensor"),
        ((INPUTS, np.array(["cat", "dog"] * 45)), "it must hold numbers; number its categories"),
        ((INPUTS, "targets"), "the data have str in place of a tensor"),
        (([[1.0], [2.0]], TARGETS), "the data have float in place of a tensor"),
        ((Table({"x": np.zeros(90), "city": np.array(["Bern"] * 90, object)}), TARGETS), "the column 'city'"),
        (TABLE, "the data are one table: give \\(inputs, targets\\)"),
        (None, "the data are NoneType: they must be"),
        (7, "the data are int: "),
        ([], "the data have no tensor"),
        (Items(5, 5), "its data are empty"),
        (DataLoader(Items(), sampler=WeightedRandomSampler([1.0] * SAMPLES, 5)), "with a WeightedRandomSampler, but"),
        (DataLoader(Items(), batch_sampler=[[0, 1], [2]]), "a DataLoader with a batch_sampler, but the plan chooses"),
        (
            DataLoader(Items(), batch_sampler=BatchSampler(RandomSampler(Items()), 4, drop_last=False), collate_fn=len),
            "a DataLoader with a batch_sampler, .* its collate_fn as the task's collate",
        ),
        (DataLoader(Items(), batch_size=None, collate_fn=len), "with batch_size=None, whose collate_fn"),
        ((np.ma.masked_greater(INPUTS.numpy(), 0), TARGETS), r"an array of the data has masked values, .*filled\(0\)"),
        ((scipy.sparse.csr_matrix(INPUTS.numpy()), TARGETS), r"a sparse matrix, a csr_matrix: .*by \.toarray\(\)"),
        (scipy.sparse.csr_array(INPUTS.numpy()), r"a sparse matrix, a csr_array: convert it"),
        (Endless(), "its Dataset has no __len__"),
    ],
)
def test_data_that_are_none_are_refused_in_words(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        task_of(given).trainer(data=None, partition="all")


@pytest.mark.parametrize("workers", [-1, 1.5, True, "two"])
def test_a_number_of_processes_that_is_none_is_refused(workers: Any) -> None:
    with pytest.raises(ConfigError, match=r"workers is .*, but must be a whole number from 0"):
        task_of(Items(), workers=workers).trainer(data=None, partition="all")


def test_samples_without_classes_cannot_be_split_by_class() -> None:
    for given in ((INPUTS, INPUTS[:, :3]), [(row, row[:3]) for row in INPUTS]):
        assert task_of(given).trainer(data=None, partition="iid:0/2").samples == 45
        assert task_of(given).trainer(data=None, partition="iid:0/2;test:0.2").samples == 9
        for partition in ("dirichlet:1:0/2:0", "dirichlet:1:0/2:0;test:0.2"):
            with pytest.raises(ConfigError, match="no classes"):
                task_of(given).trainer(data=None, partition=partition)


def test_a_dataset_of_torchvision_knows_its_targets() -> None:
    class Known(Items):
        targets = TARGETS.tolist()

        def __getitem__(self, number: int) -> Any:
            raise AssertionError("no item needs to be read")

    known, plain = (
        task_of(given).trainer(data=None, partition="dirichlet:1:1/3:0").data.labels()
        for given in (Known(), (INPUTS, TARGETS))
    )
    assert known is not None
    assert plain is not None
    assert np.array_equal(known, plain)


def read_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    reads: list[int] = []
    inner = Items.__getitem__

    def counted(self: Items, number: int) -> Any:
        reads.append(number)
        return inner(self, number)

    monkeypatch.setattr(Items, "__getitem__", counted)
    return lambda: len(reads)


def test_the_labels_of_a_dataset_are_read_once_for_all_devices_and_only_if_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = read_once(monkeypatch)
    task_of(Items()).trainers(data=None, partitions=[f"iid:{part}/5" for part in range(5)])
    assert reads() == 0
    task_of(Items()).trainers(data=None, partitions=[f"dirichlet:1:{part}/5:0" for part in range(5)])
    assert reads() == SAMPLES
