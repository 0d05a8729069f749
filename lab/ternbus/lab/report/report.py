"""The report of a run: `report.json`, `report.png`, and the table that is printed at the end."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ternbus.aggregator.store import device_metrics
from ternbus.broker.files import write_text
from ternbus.lab.report.observation import Observation
from ternbus.lab.scenario.scenario import Scenario


def summary(
    moment: Observation, *, scenario: Scenario, parameters: int, wall_seconds: float, virtual: bool = False
) -> dict[str, Any]:
    """The content of `report.json`.

    `seconds` count from version 0; `virtual` is true if they were simulated. `wall_seconds` are real, from before the
    start to after the end of all services. `updates` is the number of accepted updates, `rejected` of those that were
    too stale, malformed or forged. Bits are 8 · bytes of PUBLISH packets per parameter: uplink for each update,
    downlink for each device and version, without the evaluator's. `local` has the metrics on held-out data of devices:
    over all devices, with the newest report of each, and for each version, over the devices that reported it.
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
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def plot(report: Mapping[str, Any], path: Path) -> str | None:
    """Plot accuracy by version and by time, and staleness; without matplotlib, return a message instead."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # slow, and an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        return "no report.png: matplotlib is missing; run: pip install matplotlib"
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
    """Plot points without lines, since different devices report each version."""
    own = [row for row in versions if row["local"] is not None]
    if own:
        numbers = [row["version"] for row in own]
        for name, mark in (("median", "_"), ("worst_decile", "v")):
            values = [row["local"]["accuracy"][name] for row in own]
            axes.plot(numbers, values, mark, label=f"devices' own data, {name.replace('_', ' ')}")
        axes.legend()


def table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main figures of a report as (name, value)."""
    accuracy = report["accuracy"]
    up, down = (_or_none(report[f"bits_per_parameter_{way}"]) for way in ("up", "down"))
    return [
        ("test accuracy", "not measured" if accuracy is None else f"{accuracy:.4f}"),
        *device_metrics.sentences(report["local"]),
        ("versions", str(report["versions"][-1]["version"])),
        ("updates", f"{report['updates']} accepted, {report['rejected']} rejected"),
        ("up", f"{size(report['bytes_up'])}, {up} bits per parameter and update"),
        ("down", f"{size(report['bytes_down'])}, {down} bits per parameter, device and version"),
        (_seconds(report), f"{report['seconds']:.1f} (whole run {report['wall_seconds']:.1f})"),
    ]


def size(count: float) -> str:
    """A number of bytes with a unit: 1234567 is "1.2 MB"."""
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
