"""The benchmark that compares a simulation with real processes: what it compares, and when it says no."""

from benchmarks.agreement import TOLERANCES, apart, figures


def report(pace_s: float, stale: int) -> dict[str, object]:
    rows = [
        {"seconds": 100.0 + pace_s * number, "staleness": 1.0 * number, "staleness_max": 2 * number}
        for number in range(10)
    ]
    return {"versions": rows, "counts": {"accepted": 90, "stale": stale}, "bytes_up": 200_000}


def test_the_first_third_of_the_versions_is_left_out() -> None:
    found = figures(report(2.0, 10))
    assert found["versions_per_min"] == 30.0
    assert found["staleness"] == (4 + 5 + 6 + 7 + 8 + 9) / 6
    assert (found["accepted"], found["update_bytes"]) == (0.9, 2000.0)


def test_a_simulation_that_is_faster_or_accepts_more_does_not_agree() -> None:
    same = apart(figures(report(2.0, 10)), figures(report(2.0, 10)))
    assert set(same.values()) == {0.0}
    other = apart(figures(report(2.0, 10)), figures(report(1.0, 0)))
    assert {name for name, limit in TOLERANCES.items() if other[name] > limit} == {
        "versions_per_min", "accepted", "update_bytes"
    }  # fmt: skip
    assert other["versions_per_min"] == 1.0
