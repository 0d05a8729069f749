"""Partitions: disjoint, complete, the same on every machine, and nobody comes away with nothing."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker.errors import ConfigError
from edge_client.partition import LEAST_SAMPLES, Partition, select

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
    assert min(len(part) for part in chosen) >= min(LEAST_SAMPLES, len(labels) // parts)
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
     "dirichlet:0.5:3/3:1", "ALL", "iid:0/3 "],
)  # fmt: skip
def test_what_is_no_specification_is_refused_in_a_sentence(spec: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        Partition.parse(spec)


def test_more_devices_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 samples are too few for 4 devices"):
        select("iid:0/4", np.zeros(3, np.int64))
