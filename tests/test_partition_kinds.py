"""Every kind of partition with every kind of target: disjoint, complete, the same again, halves, and in words."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.draws import SAMPLES_MIN
from ternbus.edge.learn.labels import QUANTILES, quantiles
from ternbus.edge.learn.partition import REMEMBERED, Rows, _remembered, select, watched
from ternbus.edge.learn.partition_spec import Partition, PartitionError
from ternbus.edge.learn.task import halves_of
from ternbus.edge.torch.trainer import TorchTask

ROWS = 240
CLASSES = np.random.RandomState(5).randint(0, 6, ROWS)
NUMBERS = np.random.RandomState(6).randn(ROWS).astype(np.float32)
OWNERS = np.array(["Ida", "Bo", "Zoë"])[np.arange(ROWS) % 3]
TARGETS: dict[str, Any] = {
    "classes": CLASSES,
    "classes in a column": CLASSES[:, None],
    "texts": np.array(["cat", "dog", "eel"], object)[CLASSES % 3],
    "truth values": CLASSES > 2,
    "numbers": NUMBERS,
    "numbers in a column": NUMBERS[:, None],
    "a list": [float(number) for number in NUMBERS],
    "several numbers": np.stack([NUMBERS, NUMBERS], 1),
    "several labels": np.stack([CLASSES > 2, CLASSES > 4], 1),
    "masks": np.zeros((ROWS, 4, 4), np.int64),
    "nothing": ROWS,
}
WITH_BINS = [name for name in TARGETS if name not in ("several numbers", "several labels", "masks", "nothing")]
NEEDS_BINS = {"dirichlet": "dirichlet:0.5:{}/{}:3", "shards": "shards:2:{}/{}:3"}
NEEDS_NOTHING = {"iid": "iid:{}/{}", "quantity": "quantity:0.5:{}/{}:3"}


def parts(rows: Rows, form: str, count: int) -> list[npt.NDArray[np.int64]]:
    return [rows.of(form.format(index, count)) for index in range(count)]


def is_partition(found: list[npt.NDArray[np.int64]], rows: int) -> bool:
    """Whether the parts are sorted, disjoint and complete."""
    return all(np.all(np.diff(part) > 0) for part in found) and np.array_equal(
        np.sort(np.concatenate(found)), np.arange(rows)
    )


@pytest.mark.parametrize("count", [1, 7, 30])
@pytest.mark.parametrize(
    ("target", "form"),
    [(name, form) for name in TARGETS for form in NEEDS_NOTHING.values()]
    + [(name, form) for name in WITH_BINS for form in NEEDS_BINS.values()],
)
def test_parts_of_any_target_are_disjoint_and_cover_everything(target: str, form: str, count: int) -> None:
    rows = Rows(TARGETS[target])
    found = parts(rows, form, count)
    assert is_partition(found, ROWS)
    assert min(map(len, found)) >= min(SAMPLES_MIN, ROWS // count)
    again = [select(form.format(index, count), TARGETS[target]) for index in range(count)]
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("form", [*NEEDS_NOTHING.values(), *NEEDS_BINS.values(), "natural:{0}", "by:site:{0}", "all"])
@pytest.mark.parametrize("target", TARGETS)
def test_halves_of_any_part_are_that_part(target: str, form: str) -> None:
    rows = Rows(TARGETS[target], OWNERS, {"site": CLASSES % 4})
    if target not in WITH_BINS and form in NEEDS_BINS.values():
        with pytest.raises(PartitionError, match="no classes to split by"):
            rows.of(form.format(1, 3))
        return
    spec = form.format(1, 3)
    train, test = rows.of(f"{spec};train:0.2"), rows.of(f"{spec};test:0.2")
    assert np.array_equal(np.sort(np.concatenate([train, test])), rows.of(spec))
    assert 0 < len(test) < len(train)


@given(
    rows=st.integers(1, 300),
    count=st.integers(1, 40),
    alpha=st.sampled_from([1e-9, 0.05, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_quantity_skew_gives_random_rows_and_no_device_is_left_without(
    rows: int, count: int, alpha: float, seed: int
) -> None:
    count = min(count, rows)
    found = parts(Rows(rows), f"quantity:{alpha}:{{}}/{{}}:{seed}", count)
    assert is_partition(found, rows)
    assert min(map(len, found)) >= min(SAMPLES_MIN, rows // count)


def test_a_small_alpha_makes_unequal_sizes_with_the_same_mix_of_classes() -> None:
    labels = np.arange(6000) % 2
    rows = Rows(labels)
    unequal, equal = (parts(rows, f"quantity:{alpha}:{{}}/{{}}:1", 10) for alpha in (0.3, 1e6))
    assert max(map(len, unequal)) > 5 * np.median([len(part) for part in unequal])
    assert max(map(len, equal)) < 1.1 * min(map(len, equal))
    largest = max(unequal, key=len)
    assert 0.45 < labels[largest].mean() < 0.55


@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=300), each=st.integers(1, 4), count=st.integers(1, 20))
def test_shards_are_equal_and_each_has_few_classes(labels: list[int], each: int, count: int) -> None:
    rows, form = Rows(labels), f"shards:{each}:{{}}/{{}}:4"
    assume(each * count <= len(labels))
    found = parts(rows, form, count)
    assert is_partition(found, len(labels))
    assert max(map(len, found)) - min(map(len, found)) <= each


def test_two_shards_are_two_classes_where_shards_do_not_straddle_classes() -> None:
    labels = np.random.RandomState(2).permutation(np.repeat(np.arange(10), 40))
    found = parts(Rows(labels), NEEDS_BINS["shards"], 20)
    assert {len(part) for part in found} == {20}
    assert max(len(set(labels[part].tolist())) for part in found) == 2
    other = parts(Rows(labels), "shards:2:{}/{}:4", 20)
    assert any(not np.array_equal(one, two) for one, two in zip(found, other, strict=True))


def test_numbers_are_divided_by_ten_equal_quantiles() -> None:
    bins = quantiles(np.random.RandomState(3).permutation(1000).astype(np.float64))
    assert bins.counts.tolist() == [100] * QUANTILES
    assert quantiles(np.array([0.0, 1.0] * 50)).counts.tolist().count(50) == 2  # two values make two bins
    tied = quantiles(np.array([1.0] * 95 + [2.0] * 5))
    assert [tied.codes[0], tied.codes[-1]] == [9, 9]  # the few are in the last tenth with its edge
    broken = quantiles(np.array([1.0, np.nan, 2.0, 3.0, np.nan]))
    assert broken.codes[1] == broken.codes[4] == QUANTILES - 1


def test_dirichlet_over_quantiles_makes_devices_differ_in_their_numbers() -> None:
    values = np.random.RandomState(3).randn(4000)
    means = {}
    for alpha in (0.1, 1000.0):
        found = parts(Rows(values), f"dirichlet:{alpha}:{{}}/{{}}:1", 8)
        means[alpha] = float(np.std([values[part].mean() for part in found]))
    assert means[0.1] > 5 * means[1000.0]


def test_owners_of_any_label_are_numbered_in_their_order() -> None:
    rows = Rows(ROWS, OWNERS)
    assert [OWNERS[rows.of(f"natural:{number}")[0]] for number in range(3)] == ["Bo", "Ida", "Zoë"]
    assert is_partition([rows.of(f"natural:{number}") for number in range(3)], ROWS)
    users = np.array([1003, 57, 1003, 9])
    assert [select(f"natural:{number}", 4, users).tolist() for number in range(3)] == [[3], [1], [0, 2]]
    texts = np.array(["b", None, "a", "b"], object)
    assert [select(f"natural:{number}", 4, texts).tolist() for number in range(3)] == [[1], [2], [0, 3]]


def test_owners_that_are_numbers_from_0_keep_them() -> None:
    gaps = np.array([3, 0, 3, 1])
    assert select("natural:3", 4, gaps).tolist() == [0, 2]
    with pytest.raises(ConfigError, match=r"natural:2: .* numbered 0 to 3 \(this one has no samples\): choose another"):
        select("natural:2", 4, gaps)


@pytest.mark.parametrize(
    "table",
    [
        {"site": CLASSES % 4, "age": NUMBERS},
        np.array([(site, "x") for site in CLASSES % 4], [("site", "i4"), ("other", "U1")]),
    ],
    ids=["mapping", "structured array"],
)
def test_a_column_divides_the_rows_by_its_values(table: Any) -> None:
    for rows in (Rows(ROWS, columns=table), Rows(ROWS, lambda: table)):
        found = [rows.of(f"by:site:{number}") for number in range(4)]
        assert is_partition(found, ROWS)
        assert all((CLASSES[part] % 4 == number).all() for number, part in enumerate(found))
        with pytest.raises(PartitionError, match="by:site:4: the values of site of these data are numbered 0 to 3"):
            rows.of("by:site:4")
        with pytest.raises(PartitionError, match="there is no column 'city': the columns are site, "):
            rows.of("by:city:0")


def test_what_stands_for_a_data_frame_is_taken() -> None:
    class Frame:
        columns = ("user id", 7)

        def __getitem__(self, name: object) -> object:
            return {"user id": OWNERS, 7: CLASSES}[name]

    rows = Rows(ROWS, columns=Frame())
    assert (OWNERS[rows.of("by:user id:1")] == "Ida").all()
    assert is_partition([rows.of(f"by:7:{number}") for number in range(6)], ROWS)


def test_a_table_of_owners_with_one_column_makes_natural_devices() -> None:
    assert Rows(ROWS, {"writer": OWNERS}).of("natural:2").tolist() == [*range(2, ROWS, 3)]
    with pytest.raises(PartitionError, match=r"no owners, .*by:COLUMN:I"):
        Rows(ROWS, {"writer": OWNERS, "site": CLASSES}).of("natural:2")


@pytest.mark.parametrize(
    ("owners", "columns", "spec", "message"),
    [
        (OWNERS[:-1], None, "natural:0", "the data have 239 owners of 240 samples"),
        (np.zeros((ROWS, 2)), None, "natural:0", "an array of shape .* owners of 240 samples"),
        (None, {"site": [1]}, "by:site:0", "the data have 1 values in site of 240 samples"),
        (None, None, "by:site:0", "there is no column 'site': these data have no columns"),
    ],
)
def test_labels_that_are_not_one_for_each_row_are_refused(
    owners: object, columns: object, spec: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        select(spec, ROWS, owners, columns=columns)


@pytest.mark.parametrize("target", ["classes", "numbers", "several labels", "nothing"])
@pytest.mark.parametrize("owners", [None, OWNERS], ids=["no owners", "owners"])
@pytest.mark.parametrize("columns", [None, {"site": OWNERS}], ids=["no columns", "columns"])
def test_advice_never_recommends_what_is_then_refused(target: str, owners: object, columns: object) -> None:
    forms = {"natural": "natural:1", "by": "by:site:1", **NEEDS_BINS, **NEEDS_NOTHING, "all": "all"}
    rows = Rows(TARGETS[target], owners, columns)
    for kind, form in forms.items():
        spec = form.format(1, 3)
        try:
            rows.of(spec)
        except PartitionError as error:
            assert kind not in error.kinds
            assert str(error).startswith(f"--partition {spec}: ")
            for other in error.kinds:
                assert len(rows.of(forms[other].format(1, 3)))
        else:
            assert kind in rows.kinds


@pytest.mark.parametrize(
    "spec",
    ["quantity:0:0/3:1", "quantity:1:3/3:1", "quantity:0/3:1", "shards:0:0/3:1", "shards:2:3/3:1", "shards:2:0/3",
     "shards:1.5:0/3:1", "by:", "by:site", "by::0", "by:a;b:0", "by:site:-1", "by:a\nb:0", "iid:0/0",
     "dirichlet:1:0/3:4294967296", "dirichlet:1:0/0:1"],
)  # fmt: skip
def test_what_is_no_specification_is_refused_in_a_sentence(spec: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        Partition.parse(spec)


def test_devices_of_one_process_share_the_work() -> None:
    """The draw of all parts is made once, however many devices ask and whoever copies the data."""
    rows = Rows(CLASSES)
    first = rows.division(Partition.parse("dirichlet:0.5:0/7:1"))
    assert rows.division(Partition.parse("dirichlet:0.5:6/7:1;test:0.2")) is first
    assert rows.division(Partition.parse("dirichlet:0.5:0/7:2")) is not first
    with watched() as seen:
        for index in range(7):
            select(f"dirichlet:0.5:{index}/7:1", CLASSES.copy(), OWNERS.copy())
        assert len(seen) == 1
        select("all", CLASSES, OWNERS[::-1])
        assert len(seen) == 2
        for number in range(2 * REMEMBERED):
            select("all", number + 1)
    assert len(_remembered) == REMEMBERED


def test_a_part_that_its_owner_changes_is_whole_for_the_next() -> None:
    part = select("iid:0/3", CLASSES)
    kept = part.copy()
    part[:] = 0
    assert np.array_equal(select("iid:0/3", CLASSES), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [*NEEDS_NOTHING.values(), *NEEDS_BINS.values()])
def test_a_regression_in_torch_is_divided(form: str, dtype: torch.dtype) -> None:
    def data(_: Path | None, __: str) -> tuple[Tensor, Tensor]:
        return torch.arange(ROWS)[:, None], torch.from_numpy(NUMBERS)[:, None].to(dtype)

    task = TorchTask(name="own", model=lambda: nn.Linear(1, 1), data=data)
    found = [
        trainer.data.batch(slice(None))[0][:, 0].numpy()
        for trainer in task.trainers(data=None, partitions=[form.format(index, 4) for index in range(4)])
    ]
    assert is_partition(found, ROWS)
    for trainer, held in halves_of(task, None, [form.format(0, 4)], 0.2):
        assert trainer.samples + held.samples == len(found[0])


def test_targets_are_read_once_and_only_for_a_partition_that_needs_them() -> None:
    read: list[str] = []

    def targets() -> npt.NDArray[np.int64]:
        read.append("once")
        return CLASSES

    rows = Rows(targets, OWNERS, samples=ROWS)
    for spec in ("all", "iid:0/3", "quantity:1:0/3:1", "natural:1"):
        rows.of(spec)
    assert not read
    for spec in ("dirichlet:1:0/3:1", "shards:2:0/3:1", "all;test:0.2"):
        assert np.array_equal(rows.of(spec), select(spec, CLASSES))
    assert read == ["once"]
    with pytest.raises(PartitionError, match="no classes"):
        Rows(lambda: None, samples=ROWS).of("dirichlet:1:0/3:1")


def test_owners_are_read_only_for_a_partition_that_needs_them() -> None:
    def owners(_: Path | None) -> object:
        raise ConfigError("no file of owners")

    def data(_: Path | None, __: str) -> tuple[Tensor, Tensor]:
        return torch.zeros(4, 2), torch.zeros(4, 3)

    task = TorchTask(name="own", model=lambda: nn.Linear(2, 3), data=data, owners=owners)
    assert task.trainer(data=None, partition="iid:0/2").samples == 2
    with pytest.raises(ConfigError, match="no file of owners"):
        task.trainer(data=None, partition="natural:0")
