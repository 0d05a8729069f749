"""What a run came to: `report.json`, `report.png`, and the table at its end."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ternbus.aggregator.store import device_metrics
from ternbus.lab.report.observation import Observation
from ternbus.lab.scenario.scenario import Scenario


def summary(
    moment: Observation, *, scenario: Scenario, parameters: int, wall_seconds: float, virtual: bool = False
) -> dict[str, Any]:
    """The content of `report.json`.

    `seconds` count from version 0, and are `virtual` where they were simulated; `wall_seconds` are real, and count
    also starting and stopping. `updates` were accepted; `rejected` were too stale, malformed or forged. The bits are
    8 · bytes of PUBLISH packets a parameter: up for each update, down for each device and version. The evaluator
    follows the model too and is left out of both. `local` is what devices report of data that they hold out: over all
    of them, each with its newest report, and for each version over those that reported it.
    """
    evaluated = moment.evaluated
    versions = moment.version
    return {
        "accuracy": None if evaluated is None or evaluated.accuracy is None else round(evaluated.accuracy, 6),
        "updates": moment.accepted,
        "bytes_up": moment.bytes_up,
        "bytes_down": moment.bytes_down,
        "bits_per_parameter_up": _bits(moment.bytes_up, moment.accepted * parameters),
        "bits_per_parameter_down": _bits(moment.bytes_down, scenario.devices * versions * parameters),
        "rejected": moment.rejected,
        "virtual": virtual,
        "seconds": round(moment.last.seconds, 3),
        "local": _rounded(moment.local),
        "versions": [_rounded(asdict(version)) for version in moment.versions],
        "wall_seconds": round(wall_seconds, 3),
        "parameters": parameters,
        "counts": dict(moment.counts),
        "scenario": _scenario(scenario),
        "machine": {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
    }


def write(report: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plot(report: Mapping[str, Any], path: Path) -> str | None:
    """Accuracy over versions and over seconds, and staleness; or, without matplotlib, one line that says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # slow, and an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        return "no report.png: it needs matplotlib (pip install matplotlib)"
    versions = report["versions"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_version, by_time, staleness = figure.subplots(1, 3)
    known = [row for row in versions if row["accuracy"] is not None]
    accuracies = [row["accuracy"] for row in known]
    by_version.plot([row["version"] for row in known], accuracies, marker=".", label="test")
    _plot_local(by_version, versions)
    by_version.set(xlabel="version", ylabel="test accuracy", title="accuracy by version")
    by_time.plot([row["seconds"] for row in known], accuracies, marker=".")
    by_time.set(xlabel=f"{_seconds(report)} since version 0", ylabel="test accuracy", title="accuracy by time")
    merged = [row for row in versions if row["staleness"] is not None]
    numbers = [row["version"] for row in merged]
    staleness.plot(numbers, [row["staleness"] for row in merged], label="mean")
    staleness.plot(numbers, [row["staleness_max"] for row in merged], ".", label="largest")
    staleness.set(xlabel="version", ylabel="versions", title="staleness of the merged updates")
    staleness.legend()
    for axes in (by_version, by_time, staleness):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=110)
    return None


def _plot_local(axes: Any, versions: Sequence[Mapping[str, Any]]) -> None:
    """Points, not lines: each version is reported by other devices."""
    own = [row for row in versions if row["local"] is not None]
    if own:
        numbers = [row["version"] for row in own]
        for name, mark in (("median", "_"), ("worst_decile", "v")):
            values = [row["local"]["accuracy"][name] for row in own]
            axes.plot(numbers, values, mark, label=f"devices' own data, {name.replace('_', ' ')}")
        axes.legend()


def table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few figures that a person wants to see at the end, each with its name."""
    accuracy = report["accuracy"]
    up, down = (_or_none(report[f"bits_per_parameter_{way}"]) for way in ("up", "down"))
    return [
        ("test accuracy", "not measured" if accuracy is None else f"{accuracy:.4f}"),
        *device_metrics.sentences(report["local"]),
        ("versions", str(report["versions"][-1]["version"])),
        ("updates", f"{report['updates']} accepted, {report['rejected']} rejected"),
        ("up", f"{size(report['bytes_up'])}, {up} bits a parameter and update"),
        ("down", f"{size(report['bytes_down'])}, {down} bits a parameter, device and version"),
        (_seconds(report), f"{report['seconds']:.1f} (whole run {report['wall_seconds']:.1f})"),
    ]


def size(count: float) -> str:
    """A number of bytes for people: 1234567 is "1.2 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _seconds(report: Mapping[str, Any]) -> str:
    return "virtual seconds" if report["virtual"] else "seconds"


def _bits(count: int, parameters: int) -> float | None:
    return round(8 * count / parameters, 4) if parameters else None


def _or_none(bits: float | None) -> str:
    return "no" if bits is None else f"{bits:.2f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def _scenario(scenario: Scenario) -> dict[str, Any]:
    values = asdict(scenario)
    return values | {"data": None if scenario.data is None else str(scenario.data)}
