"""The report of a run: `report.json`, `report.png`, and the table that is printed at the end."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.store import device_metrics
from ternbus.aggregator.store.device_metrics import shown_name, shown_value
from ternbus.aggregator.sums.groups import BELOW_MIN
from ternbus.broker.files import write_text
from ternbus.broker.plural import counted
from ternbus.broker.protocol.direction import ACCURACY, LOWER, direction_of, for_people
from ternbus.broker.text_table import text_table
from ternbus.lab.report import plots
from ternbus.lab.report.observation import Device, Observation
from ternbus.lab.report.plots import ranked
from ternbus.lab.scenario.scenario import Scenario

COLUMNS: Final = 3  # of panels in the plot


def summary(
    moment: Observation,
    *,
    scenario: Scenario,
    parameters: int,
    wall_seconds: float,
    virtual: bool = False,
    sets: int | None = None,
) -> dict[str, Any]:
    """The content of `report.json`.

    `seconds` count from version 0; `virtual` is true if they were simulated. `wall_seconds` are real, from before the
    start to after the end of all services. `updates` is the number of accepted updates, `rejected` of those that were
    too stale, malformed or forged. Bits are 8 · bytes of PUBLISH packets per parameter: uplink for each update,
    downlink for each device and version, without the evaluator's. `metrics` are those of the newest version that was
    evaluated, `metric` is the primary one, `better` has the direction of each, and `best` its best value and the first
    version with it. `local` has the metrics on held-out data of devices: over all devices, with the newest report of
    each, and for each version, over the devices that reported it. `devices` has for each device the samples that it
    trains on, also by class where it says so, its own metrics and the gain of its own model. `private`, only with
    private sums, has the number of merged `sets`, the updates that were dropped by reason, and as `dropped_share` the
    share of accepted updates that were dropped because too few devices sent one on the same version. `search`, only
    with a search in the federation, has its arms and its steps, as `aggregator status --json`.
    """
    metrics = {} if moment.evaluated is None else moment.evaluated.metrics
    best = {name: found for name in metrics if (found := moment.best(name)) is not None}
    versions = moment.version
    return {
        "accuracy": _rounded(moment.newest(ACCURACY)),
        "metric": moment.metric,
        "better": dict(moment.better),
        "metrics": _rounded(metrics),
        "best": _rounded({name: {"value": row.metrics[name], "version": row.version} for name, row in best.items()}),
        "updates": moment.accepted,
        "bytes_up": moment.bytes_up,
        "bytes_down": moment.bytes_down,
        "bits_per_parameter_up": _bits(moment.bytes_up, moment.accepted * parameters),
        "bits_per_parameter_down": _bits(moment.bytes_down, scenario.devices * versions * parameters),
        "rejected": moment.rejected,
        "virtual": virtual,
        "seconds": round(moment.last.seconds, 3),
        "local": _rounded(moment.local),
        "devices": {device.name: _device(device) for device in moment.devices},
        "versions": [_rounded(asdict(version)) for version in moment.versions],
        **({} if sets is None else {"private": _private(moment, sets)}),
        **({} if moment.search is None else {"search": moment.search}),
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


def _private(moment: Observation, sets: int) -> dict[str, Any]:
    alone = moment.dropped.get(BELOW_MIN, 0)
    share = round(alone / moment.accepted, 6) if moment.accepted else None
    return {"sets": sets, "dropped": dict(moment.dropped), "dropped_share": share}


def _device(device: Device) -> dict[str, Any]:
    about: dict[str, Any] = {
        "updates": device.updates,
        "samples": device.samples,
        "classes": device.classes,
        "epsilon": device.epsilon,
        "local": device.local,
    }
    return {name: _rounded(value) for name, value in about.items()}


def write(report: Mapping[str, Any], path: Path) -> None:
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def plot(report: Mapping[str, Any], path: Path) -> str | None:
    """Plot the metrics by version and by time, staleness, and the devices; without matplotlib, return a message."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow, and an extra
        from matplotlib.figure import Figure  # noqa: PLC0415 - likewise
    except ImportError:
        return "no report.png: matplotlib is missing; run: pip install matplotlib"
    panels = plots.panels(report, _seconds(report))
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(13, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, draw in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        draw(axes)
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=110)
    return None


def table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main figures of a report as (name, value)."""
    up, down = (_or_none(report[f"bits_per_parameter_{way}"]) for way in ("up", "down"))
    return [
        *_test(report),
        *device_metrics.sentences(report["local"]),
        ("versions", str(report["versions"][-1]["version"])),
        ("updates", f"{report['updates']} accepted, {report['rejected']} rejected"),
        *_sets(report),
        *_search(report),
        ("up", f"{size(report['bytes_up'])}, {up} bits per parameter and update"),
        ("down", f"{size(report['bytes_down'])}, {down} bits per parameter, device and version"),
        (_seconds(report), f"{report['seconds']:.1f} (whole run {report['wall_seconds']:.1f})"),
    ]


def _sets(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Private sums, if there were any."""
    about = report.get("private")
    if about is None:
        return []
    share = "" if about["dropped_share"] is None else f"; {about['dropped_share']:.1%} of updates without company"
    why = ", ".join(f"{count} {reason}" for reason, count in about["dropped"].items())
    return [("private sums", f"{about['sets']} merged{share}{f' (dropped: {why})' if why else ''}")]


def _search(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a search has found, if there was one."""
    about = report.get("search")
    if about is None:
        return []
    found = []
    for name, best in zip(about["classes"], about["best"], strict=True):
        arm = (
            "nothing yet"
            if best is None
            else ", ".join(f"{key} {value:g}" for key, value in about["arms"][best].items())
        )
        found.append(f"{arm}{f' for {name}…' if name else ''}")
    rungs = len(about["steps"]) - 1
    nobody = rungs == 0 and about["judged"] == 0
    remark = "; no two devices with held-out data have judged a version: set `hold_out` in [local]" if nobody else ""
    return [("search", f"{'; '.join(found)} ({counted(rungs, 'rung')}){remark}")]


def _test(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics of the test data, the primary one first."""
    rows = []
    for name in for_people(report["metrics"], report["metric"]):
        remarks = ["lower is better"] if direction_of(name, report["better"]) == LOWER else []
        best, version = report["best"][name]["value"], report["best"][name]["version"]
        if best != report["metrics"][name]:
            remarks.append(f"best {shown_value(best)} at version {version}")
        remark = f" ({', '.join(remarks)})" if remarks else ""
        rows.append((f"test {shown_name(name)}", f"{shown_value(report['metrics'][name])}{remark}"))
    return rows or [("test accuracy", "not measured")]


def device_table(report: Mapping[str, Any], rows_max: int) -> list[str]:
    """The devices that measured on their own data, the worst first, and an empty line; empty without any."""
    if report["local"] is None:
        return []
    metric, tuned = report["local"]["metric"], report["local"]["fine_tuned"] is not None
    ordered = ranked(report)
    columns = {"device": "<"}
    columns |= dict.fromkeys(("updates", "samples", "held out", f"own {shown_name(metric)}"), ">")
    columns |= {"gain of its own model": ">"} if tuned else {}
    rows = []
    for name, row in ordered[:rows_max]:
        local = row["local"]
        gain = [shown_value(local["gain"].get(metric), "+")] if tuned else []
        measured = [local["samples"], shown_value(local["metrics"][metric]), *gain]
        rows.append([name, row["updates"], row["samples"], *measured])
    more = len(ordered) - rows_max
    return [*text_table(columns, rows), *([f"and {more} more, in report.json"] if more > 0 else []), ""]


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
    del values["source"]
    return values | {"data": None if scenario.data is None else str(scenario.data)}
