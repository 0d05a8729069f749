"""The benchmark's time to accuracy: a version has reached it when it and the two after it have it on average."""

import pytest

from benchmarks.time_to_accuracy import compared, figures, reached


@pytest.mark.parametrize(
    ("accuracies", "version"),
    [
        ([0.1, 0.8, 0.86, 0.87, 0.88], 2),
        ([0.1, 0.86, 0.80, 0.81, 0.86, 0.85, 0.85], 4),  # the first was lucky
        ([0.1, 0.84, 0.90, 0.90, 0.90], 2),  # a mean alone does not count
        ([0.1, 0.8, 0.9, 0.9], None),  # nobody knows yet whether it stays
        ([0.1, 0.9, None, 0.9], None),
        ([], None),
    ],
)
def test_one_lucky_version_does_not_count(accuracies: list[float | None], version: int | None) -> None:
    assert reached([{"accuracy": accuracy} for accuracy in accuracies], 0.85) == version


def report(seconds: float, size: int) -> dict[str, object]:
    rows = [
        {
            "accuracy": 0.3 * version,
            "seconds": seconds * version,
            "updates": 2,
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
    assert (found["version"], found["seconds"], found["updates"]) == (2, 20.0, 6)
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
