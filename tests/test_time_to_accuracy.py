"""The benchmark's time to accuracy: a version has reached it when it and the two after it have it on average."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import slow_classes
from benchmarks.time_to_accuracy import (
    ASYNCHRONOUS,
    BARRIER,
    DEVICES,
    FIRST_FLOAT32,
    FIRST_TERNARY,
    WAYS,
    against,
    compared,
    figures,
    reached,
    scenario,
)
from ternbus.edge.tasks import digits_data


@pytest.mark.parametrize(
    ("accuracies", "updates", "version"),
    [
        ([0.1, 0.8, 0.86, 0.87, 0.88], 10, 2),
        ([0.1, 0.86, 0.80, 0.81, 0.86, 0.85, 0.85], 10, 4),  # the first was lucky
        ([0.1, 0.84, 0.90, 0.90, 0.90], 10, 2),  # a mean alone does not count
        ([0.1, 0.8, 0.9, 0.9], 10, None),  # nobody knows yet whether it stays
        ([0.1, 0.9, None, 0.9], 10, None),
        ([0.1, 0.8, 0.86, 0.87, 0.88], 20, 2),  # at least three versions, of however many updates
        ([0.1, 0.86, 0.87, 0.80, 0.81, 0.86, 0.86, 0.86, 0.86, 0.86], 5, 5),  # of small ones, more: 20 updates are five
        ([0.1, 0.8, 0.86, 0.87, 0.88], 5, None),
        ([], 10, None),
    ],
)
def test_one_lucky_version_does_not_count(accuracies: list[float | None], updates: int, version: int | None) -> None:
    assert reached([{"accuracy": accuracy, "updates": updates} for accuracy in accuracies], 0.85) == version


def report(seconds: float, size: int) -> dict[str, object]:
    rows = [
        {
            "accuracy": 0.3 * version,
            "seconds": seconds * version,
            "updates": 10,
            "update_bytes": size * version,
            "delta_bytes": size * version,
            "snapshot_bytes": 100,
        }
        for version in range(5)
    ]
    bits = {"bits_per_parameter_up": 1.0, "bits_per_parameter_down": 1.0, "wall_seconds": 1.0}
    return {"versions": rows, **bits}


def test_figures_are_those_of_the_version_that_reached_it() -> None:
    found = figures(report(10.0, 1000), 0.5)
    assert (found["version"], found["seconds"], found["updates"]) == (2, 20.0, 30)
    assert (found["up"], found["both"]) == (2000, 4100)


def test_the_ways_are_compared_where_both_came_so_far() -> None:
    quick, slow = figures(report(1.0, 100), 0.5), figures(report(10.0, 1000), 0.5)
    same = {"sooner": 10.0, "up": 0.1, "both": 500 / 4100}
    assert compared([quick], [slow]) == same
    assert compared([quick, quick], [slow, slow]) == same
    never = figures(report(1.0, 100), 2.0)
    assert never["version"] is None
    assert compared([never], [slow]) is None
    assert compared([quick, never], [slow, slow]) is None


ASKED = Namespace(
    data=Path("data"),
    buffer=10,
    bound=50,
    first=10,
    median_s=10.0,
    up_mbit_s=1.0,
    down_mbit_s=4.0,
    versions=9,
    seconds=9.0,
)


@pytest.mark.parametrize("made_by", [scenario, slow_classes.scenario])
def test_over_selection_takes_the_first_updates_on_a_version_and_a_barrier_all(made_by: object) -> None:
    assert callable(made_by)
    made = {way: made_by(way, 0, ASKED) for way in WAYS}
    keys = "merge.buffer_size", "staleness.max"
    merging = {way: tuple(each.aggregator.get(key) for key in keys) for way, each in made.items()}
    assert merging == {
        ASYNCHRONOUS: (10, 50), FIRST_TERNARY: (10, 0), FIRST_FLOAT32: (10, 0), BARRIER: (None, None)
    }  # fmt: skip
    assert [way for way, each in made.items() if each.sync] == [BARRIER]
    assert {way: each.plan["codec"] for way, each in made.items()} == {
        ASYNCHRONOUS: "ternary", FIRST_TERNARY: "ternary", FIRST_FLOAT32: "float32", BARRIER: "float32"
    }  # fmt: skip


def test_the_calibrated_way_is_asynchronous_with_a_smaller_rate() -> None:
    plain, calibrated = (slow_classes.scenario(way, 0, ASKED) for way in slow_classes.ALL_WAYS[:2])
    assert dict(calibrated.aggregator) == {**plain.aggregator, "optimizer.learning_rate": slow_classes.RATE}


def test_the_asynchronous_way_is_compared_with_each_other_way() -> None:
    quick, slow = figures(report(1.0, 100), 0.5), figures(report(10.0, 1000), 0.5)
    found = against([{ASYNCHRONOUS: quick, FIRST_TERNARY: quick, FIRST_FLOAT32: slow, BARRIER: slow}])
    assert {way: ratios and ratios["sooner"] for way, ratios in found.items()} == {
        FIRST_TERNARY: 1.0, FIRST_FLOAT32: 10.0, BARRIER: 10.0
    }  # fmt: skip


def test_the_slowest_devices_have_the_slow_classes_and_nobody_else_has() -> None:
    labels, paces = digits_data.load("train")[1], np.arange(DEVICES)[::-1].astype(float).tolist()
    found = slow_classes.owners(labels, paces, 1)
    slow = {*range(slow_classes.SLOW_DEVICES)}
    assert {*found[np.isin(labels, slow_classes.SLOW_CLASSES)].tolist()} == slow
    assert not slow & {*found[~np.isin(labels, slow_classes.SLOW_CLASSES)].tolist()}


def test_the_slow_classes_are_measured_alone() -> None:
    task = slow_classes.OwnedDigits(paces=(1.0,) * DEVICES, seed=0)
    zeros = {name: np.zeros_like(tensor) for name, tensor in task.initial(0).items()}
    zeros["output.bias"][7] = 1.0  # every answer is a seven
    values = task.evaluator(data=None).evaluate(zeros).values
    assert values["accuracy"] == pytest.approx(0.1, abs=0.01)
    assert values[slow_classes.METRIC] == pytest.approx(1 / 3, abs=0.02)


def test_a_final_accuracy_is_that_of_the_last_tenth_of_the_time() -> None:
    runs = [{"seconds": [0.0, 50.0, 85.0], "accuracy": [0.1, 0.5, 0.8]}, {"seconds": [0.0], "accuracy": [0.4]}]
    assert slow_classes.final(runs, "accuracy", 100.0) == pytest.approx((0.6, 0.2))


def test_an_accuracy_is_reached_for_good_where_no_later_version_has_less() -> None:
    runs = [
        {"seconds": [0.0, 50.0, 85.0, 90.0], "accuracy": [0.1, 0.8, 0.7, 0.8]},
        {"seconds": [0.0, 30.0], "accuracy": [0.1, 0.8]},
    ]
    assert slow_classes.until(runs, 0.75) == 60.0
    assert slow_classes.until([*runs, {"seconds": [0.0], "accuracy": [0.4]}], 0.75) is None
