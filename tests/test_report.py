"""The report of a run: the figures of report.json, its plot, and the progress that people see."""

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ternbus.aggregator.store.device_metrics import Report
from ternbus.aggregator.store.measurements import Measurements
from ternbus.lab.report import plots, progress, report
from ternbus.lab.report.observation import Observation
from ternbus.lab.scenario.scenario import Scenario

PARAMETERS = 1000


def status() -> dict[str, Any]:
    """As `aggregator status --json` prints it: two devices, an evaluator, two versions of which one is evaluated."""
    row = {"last_seq": 5, "base": 1, "staleness": 0, "state": "training"}
    return {
        "federation": "lab",
        "version": 2,
        "state": "open",
        "metric": "accuracy",
        "better": {"accuracy": "higher", "loss": "lower"},
        "counts": {
            "accepted": 8,
            "merged": 8,
            "stale": 2,
            "duplicate": 1,
            "busy": 0,
            "invalid": {"bad-scale": 1, "bad-signature": 2},
        },
        "devices": {
            "device-0": row | {"updates": 5},
            "device-1": row | {"updates": 3},
            "evaluator": row | {"updates": 0},
        },
        "versions": [
            {"version": 0, "time": 100.0, "updates": 0, "staleness_mean": 0.0, "staleness_max": 0, "metrics": {}},
            {
                "version": 1,
                "time": 101.5,
                "updates": 4,
                "staleness_mean": 0.5,
                "staleness_max": 2,
                "metrics": {"accuracy": 0.75, "loss": 0.5},
                "evaluations": {"judge": {"accuracy": 0.75, "loss": 0.5}},
            },
            {"version": 2, "time": 103.0, "updates": 4, "staleness_mean": 1.5, "staleness_max": 3, "metrics": {}},
        ],
    }


COUNTERS = {
    "device-0": {"sent_bytes.update": 1000, "received_bytes.delta": 500, "received_bytes.head": 77},
    "device-1": {"sent_bytes.update": 600, "received_bytes.delta": 500},
}


@pytest.fixture
def moment() -> Observation:
    return Observation.read(status(), COUNTERS)


@pytest.fixture
def summary(moment: Observation) -> dict[str, Any]:
    return report.summary(moment, scenario=Scenario(devices=2), parameters=PARAMETERS, wall_seconds=9.0)


def test_the_report_has_the_figures(summary: dict[str, Any]) -> None:
    assert summary["accuracy"] == 0.75
    assert summary["updates"] == 8
    assert (summary["bytes_up"], summary["bytes_down"]) == (1600, 1000)
    assert summary["bits_per_parameter_up"] == 8 * 1600 / (8 * PARAMETERS)
    assert summary["bits_per_parameter_down"] == 8 * 1000 / (2 * 2 * PARAMETERS)
    assert summary["rejected"] == 5
    assert summary["seconds"] == 3.0


def test_each_version_has_its_row(summary: dict[str, Any]) -> None:
    assert summary["versions"][1] == {
        "version": 1,
        "seconds": 1.5,
        "accuracy": 0.75,
        "loss": 0.5,
        "updates": 4,
        "staleness": 0.5,
        "staleness_max": 2,
        "evaluations": {"judge": {"accuracy": 0.75, "loss": 0.5}},
        "local": None,
    }
    assert summary["versions"][2]["accuracy"] is None


def test_the_report_has_the_spread_over_devices(tmp_path: Path) -> None:
    tests = Measurements()
    for name, version, accuracy in (("device-0", 1, 0.25), ("device-1", 1, 0.5), ("device-1", 2, 1 / 3)):
        tests.add_local(Report(device=name, version=version, samples=5, values={"accuracy": accuracy}))
    found = status()
    for row in found["versions"]:
        row["local"] = tests.version(row["version"])["local"]
    moment = Observation.read(found | {"local": tests.common()["local"]}, COUNTERS)
    summary = report.summary(moment, scenario=Scenario(), parameters=PARAMETERS, wall_seconds=1.0)
    assert [row["local"] and row["local"]["devices"] for row in summary["versions"]] == [None, 2, 1]
    spread = {"worst_decile": 0.25, "median": 0.291667, "mean": 0.291667}
    assert summary["local"]["metrics"]["accuracy"] == {"better": "higher", "devices": 2, **spread}
    assert "worst tenth 0.2500, median 0.2917" in progress.closing_table(summary, ["report.json"])
    if find_spec("matplotlib"):
        assert report.plot(summary, tmp_path / "with.png") is None
        assert (tmp_path / "with.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_json(summary: dict[str, Any], tmp_path: Path) -> None:
    report.write(summary, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(summary))


def test_a_run_without_a_version_has_no_bits(tmp_path: Path) -> None:
    start = status()
    start["counts"] |= {"accepted": 0}
    start["versions"] = start["versions"][:1]
    empty = report.summary(Observation.read(start, {}), scenario=Scenario(), parameters=PARAMETERS, wall_seconds=1.0)
    assert (empty["accuracy"], empty["bits_per_parameter_up"], empty["bits_per_parameter_down"]) == (None, None, None)
    assert "not measured" in progress.closing_table(empty, ["report.json"])


def test_the_plot_is_a_picture(summary: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.plot(summary, tmp_path / "report.png") is None
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("classes", [0, 3])
def test_the_samples_of_many_devices_are_one_shape_for_each_class(classes: int, summary: dict[str, Any]) -> None:
    """A shape for each device and class took a minute for ten thousand devices."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    rows = {f"device-{n}": {"samples": n, "classes": {str(c): n + c for c in range(classes)}} for n in range(500)}
    axes = Figure().add_subplot()
    plots.panels(summary | {"devices": rows}, "s")[-1](axes)
    assert len(axes.patches) == max(1, classes)
    last: Any = axes.patches[-1]
    assert last.get_data().values[-1] == (sum(499 + number for number in range(classes)) if classes else 499)


def test_without_matplotlib_one_line_says_so(
    summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in (report.plot(summary, tmp_path / "report.png") or "")
    assert not (tmp_path / "report.png").exists()


def test_the_newest_known_accuracy_is_the_one_that_counts(moment: Observation) -> None:
    assert moment.evaluated is not None
    assert (moment.evaluated.version, moment.version, moment.newest("accuracy")) == (1, 2, 0.75)
    assert moment.best("accuracy") is moment.evaluated


def test_where_there_is_no_terminal_a_version_is_a_line_once(moment: Observation) -> None:
    stream = io.StringIO()
    with progress.to(stream) as shown:
        shown.say("hello")
        shown.show(moment, 3.0)
        shown.show(moment, 3.5)
    assert stream.getvalue().splitlines() == [
        "hello",
        "version 2  accuracy 0.7500  updates 8  staleness 1.5  up 1.6 kB  down 1.0 kB  seconds 3",
    ]


def test_on_a_terminal_each_device_is_a_row(moment: Observation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress.to(stream) as shown:
        shown.show(moment, 3.0)
    assert all(word in stream.getvalue() for word in ("device-0", "device-1", "training"))
    assert "evaluator" not in stream.getvalue()


def test_a_device_that_has_not_enrolled_is_a_row_too() -> None:
    start = status() | {"devices": {}}
    (row,) = Observation.read(start, {"device-0": {}}).devices
    assert (row.name, row.state, row.updates) == ("device-0", "starting", 0)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (5_000_000, "5.0 MB"), (7e12, "7000.0 GB")]
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert report.size(count) == text
