"""The race of asynchronous and synchronous ways: who takes part, by which rules, and who has won."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.race import (
    DIGITS,
    FINALISTS,
    SERVERS,
    UNBOUNDED,
    best,
    best_of_each,
    cells,
    never,
    raced,
    ranked,
    sooner,
    ways,
)

ALL = list(ways())


def row(way: str, synchronous: bool, *times: float | None) -> dict[str, Any]:
    seeds = [
        {"version": None} if each is None else {"version": 4, "seconds": each, "both": 2e6, "best": 0.9}
        for each in times
    ]
    return {"way": way, "synchronous": synchronous, "seeds": seeds}


ROWS = [
    row("first 4 of 20, fedavg", True, 30.0, 50.0),
    row("first 4 of 20, fedavgm", True, 30.0, 40.0),
    row("first 7 of 20, fedavg", True, 60.0, None),
    row("buffer 2, no discount, fedavg", False, 10.0, 18.0),
    row("buffer 2, CA2FL, fedavg", False, 40.0, 60.0),
]


def test_every_way_has_a_name_of_its_own_and_the_finalists_are_among_them() -> None:
    names = [way.name for way in ALL]
    assert len({*names}) == len(names)
    assert {*FINALISTS} <= {*names}


def test_synchronous_ways_merge_updates_on_the_newest_version_alone_and_choose_from_the_same_optimizers() -> None:
    bounds = {way.synchronous: {each.settings["staleness.max"] for each in ALL if each.synchronous is way.synchronous}
              for way in ALL}  # fmt: skip
    assert bounds == {True: {0}, False: {UNBOUNDED}}
    for server, settings in SERVERS.items():
        assert {way.synchronous for way in ALL if way.name.endswith(f", {server}")} == {True, False}
        assert all(settings.items() <= way.settings.items() for way in ALL if way.name.endswith(f", {server}"))


def test_a_way_that_has_not_arrived_with_every_seed_has_lost() -> None:
    assert [each["way"] for each in ranked(ROWS)] == [ROWS[index]["way"] for index in (3, 1, 0, 4)]
    assert best(ROWS, synchronous=True) is ROWS[1]
    assert best(ROWS[2:], synchronous=True) is None


def test_a_way_is_compared_with_the_best_synchronous_one_by_means_over_the_seeds() -> None:
    assert sooner(ROWS[3], ROWS) == 2.5
    assert sooner(ROWS[2], ROWS) is None
    assert sooner(ROWS[3], ROWS[2:]) is None
    assert cells(ROWS[3], ROWS) == [
        "asynchronous", "buffer 2, no discount, fedavg", "14.0", "10, 18", "4", "2.0", "2.50"
    ]  # fmt: skip


def test_the_short_table_has_the_best_optimizer_of_each() -> None:
    assert [each["way"] for each in best_of_each(ROWS)] == [ROWS[index]["way"] for index in (3, 1, 4)]
    assert never(ROWS) == ["first 7 of 20"]


@pytest.mark.slow
def test_a_way_with_an_algorithm_of_its_own_runs_and_is_kept(tmp_path: Path) -> None:
    asked = Namespace(seeds=1, data=None, median_s=10.0, up_mbit_s=1.0, down_mbit_s=4.0, out=tmp_path)
    (way,) = (way for way in ALL if way.name == "buffer 10, CA2FL, rate 0.5")
    found = raced(way, DIGITS, asked)
    assert found["way"] == way.name
    (kept,) = tmp_path.iterdir()
    changed = kept.stat().st_mtime_ns
    assert raced(way, DIGITS, asked) == found
    assert kept.stat().st_mtime_ns == changed
