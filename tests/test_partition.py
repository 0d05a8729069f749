"""Partitions are disjoint, complete and the same on every machine, and no device gets nothing."""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.draws import SAMPLES_MIN
from ternbus.edge.learn.partition import select
from ternbus.edge.learn.partition_spec import LARGEST_SHARE, Partition

Labels = npt.NDArray[np.int64]

labels_of_some_classes = hnp.arrays(np.int64, st.integers(1, 400), elements=st.integers(0, 9))


def specs(parts: int, alpha: float | None, seed: int) -> list[str]:
    if alpha is None:
        return [f"iid:{index}/{parts}" for index in range(parts)]
    return [f"dirichlet:{alpha}:{index}/{parts}:{seed}" for index in range(parts)]


@given(
    labels=labels_of_some_classes,
    parts=st.integers(1, 30),
    alpha=st.none() | st.sampled_from([1e-9, 0.01, 0.1, 0.5, 1.0, 10.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_parts_are_disjoint_and_cover_everything_and_none_is_poor(
    labels: Labels, parts: int, alpha: float | None, seed: int
) -> None:
    parts = min(parts, len(labels))
    chosen = [select(spec, labels) for spec in specs(parts, alpha, seed)]
    assert sorted(np.concatenate(chosen).tolist()) == list(range(len(labels)))
    assert min(len(part) for part in chosen) >= min(SAMPLES_MIN, len(labels) // parts)
    assert all(np.all(np.diff(part) > 0) for part in chosen)


def test_all_is_everything() -> None:
    assert select("all", np.zeros(7, np.int64)).tolist() == list(range(7))


def test_equal_parts_differ_by_at_most_one_sample() -> None:
    assert sorted(len(select(spec, np.zeros(100, np.int64))) for spec in specs(7, None, 0)) == [14] * 5 + [15] * 2


def test_the_draw_is_the_same_everywhere() -> None:
    """Known answers: a device with another numpy must find the same parts, or they would not be disjoint."""
    labels = np.arange(40) % 4
    assert select("iid:1/5", labels).tolist() == [2, 18, 27, 29, 30, 35, 37, 39]
    assert select("dirichlet:0.5:1/5:7", labels).tolist() == [2, 5, 7, 9, 13, 17, 32, 37]
    assert select("dirichlet:0.5:1/5:8", labels).tolist() != [2, 5, 7, 9, 13, 17, 32, 37]


def test_parts_of_before_are_the_parts_of_today() -> None:
    """Devices that joined with any release keep their rows: the digest was taken before there were other kinds."""
    labels = np.random.RandomState(1).randint(0, 7, 300).astype(np.int64)
    owners = np.arange(300, dtype=np.int64) % 5
    digest = blake2b(digest_size=8)
    for part in [
        *(spec for alpha in (None, 1e-9, 0.01, 0.5, 1e6) for spec in specs(20, alpha, 7)),
        "all",
        *(f"natural:{owner}" for owner in range(5)),
    ]:
        for half in ("", ";train:0.3", ";test:0.3"):
            digest.update(select(f"{part}{half}", labels, owners).tobytes())
    assert digest.hexdigest() == "ab5e950108cdaf57"


def test_a_small_alpha_gives_each_class_to_few_devices_and_a_large_one_to_all_alike() -> None:
    labels = np.arange(8000) % 10
    shares = {}
    for alpha in (0.1, 100.0):
        held = np.array([np.bincount(labels[select(spec, labels)], minlength=10) for spec in specs(8, alpha, 3)])
        shares[alpha] = float((held.max(0) / 800).mean())  # the share of the one who has most of a class
    assert shares[0.1] > 0.5
    assert shares[100.0] < 0.2


@pytest.mark.parametrize(
    "spec",
    ["", "some", "iid", "iid:1", "iid:3/3", "iid:-1/3", "iid:0/0", "iid:0/3:1", "dirichlet:0.5:0/3",
     "dirichlet:0:0/3:1", "dirichlet:-1:0/3:1", "dirichlet:e:0/3:1", "dirichlet:1e7:0/3:1",
     "dirichlet:0.5:3/3:1", "ALL", "iid:0/3 ", "natural", "natural:", "natural:-1", "natural:0/3",
     "all;test:", "all;test:x", "all;test:1.2.3", ";test:0.1", "all;test:0.1;train:0.1", "all;valid:0.1"],
)  # fmt: skip
def test_what_is_no_specification_is_refused_in_a_sentence(spec: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        Partition.parse(spec)


def test_natural_parts_are_those_of_the_owners() -> None:
    owners = np.array([2, 0, 2, 1], np.int64)
    assert [select(f"natural:{number}", np.zeros(4, np.int64), owners).tolist() for number in range(3)] == [
        [1],
        [3],
        [0, 2],
    ]
    with pytest.raises(ConfigError, match="numbered 0 to 2"):
        select("natural:3", np.zeros(4, np.int64), owners)
    with pytest.raises(ConfigError, match="no natural devices"):
        select("natural:0", np.zeros(4, np.int64))


@given(
    labels=hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 9)),
    more=st.integers(1, 100),
    kind=st.sampled_from(["iid:{}/{}", "dirichlet:0.3:{}/{}:4", "quantity:0.3:{}/{}:4", "shards:2:{}/{}:4"]),
)
def test_more_devices_than_samples_have_a_few_each_and_together_all(labels: Labels, more: int, kind: str) -> None:
    count = len(labels) + more
    chosen = [select(kind.format(index, count), labels) for index in range(count)]
    assert {*np.concatenate(chosen).tolist()} == {*range(len(labels))}
    assert all(len(part) and np.all(np.diff(part) > 0) for part in chosen)
    if kind.startswith(("iid", "shards")):
        assert max(map(len, chosen)) <= SAMPLES_MIN + 2 + len(labels) // count


def test_the_few_samples_of_a_device_depend_on_the_seed_alone() -> None:
    labels = np.arange(20) % 4
    one, again = (select("quantity:1.0:7/50:3", labels) for _ in range(2))
    assert one.tolist() == again.tolist() != select("quantity:1.0:7/50:4", labels).tolist()
    with pytest.raises(ConfigError, match="no samples to divide"):
        select("iid:0/4", np.zeros(0, np.int64))


@given(
    labels=hnp.arrays(np.int64, st.integers(12, 400), elements=st.integers(0, 9)),
    part=st.sampled_from(["all", "iid:1/3", "dirichlet:0.3:1/3:4", "natural:1"]),
    share=st.floats(0.01, LARGEST_SHARE),
)
def test_what_is_held_out_is_never_trained_on(labels: Labels, part: str, share: float) -> None:
    owners = np.arange(len(labels)) % 3
    whole = select(part, labels, owners)
    train, test = (select(f"{part};{half}:{share!r}", labels, owners) for half in ("train", "test"))
    assert sorted([*train.tolist(), *test.tolist()]) == whole.tolist()
    assert max(1, int(share * len(whole))) <= len(test) + 1e-9 <= max(1.0, share * len(whole)) + 1e-6
    assert len(test) < len(train)


def test_the_end_of_each_class_is_held_out() -> None:
    """Of a recording the end: windows overlap, and one between two that were trained on would be no test."""
    labels = np.array([0] * 10 + [1] * 5 + [0] * 10)
    assert select("all;test:0.2", labels).tolist() == [14, 21, 22, 23, 24]
    alternating = np.arange(20) % 2
    assert select("all;test:0.1", alternating).tolist() == [18, 19]


def test_the_least_that_is_held_out_is_one_sample_and_two_are_too_few_to_hold_out_any() -> None:
    assert select("all;test:0.01", np.zeros(3, np.int64)).tolist() == [2]
    with pytest.raises(ConfigError, match="2 samples: too few to hold some out"):
        select("iid:0/2;train:0.2", np.zeros(4, np.int64))


@pytest.mark.parametrize("spec", ["all;test:0", "all;test:0.5", "all;test:-0.1", "all;train:1e3", "all;train:nan"])
def test_most_of_the_data_are_trained_on(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"held-out|not a number|write all"):
        Partition.parse(spec)
