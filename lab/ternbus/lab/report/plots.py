"""The panels of a report's plot: each a function that draws on one pair of matplotlib's axes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from ternbus.aggregator.store.device_metrics import shown_name
from ternbus.broker.protocol.direction import LOWER, PERSONAL, direction_of, for_people, sign_of

Panel = Callable[[Any], None]
OTHERS_MAX: Final = 6  # metrics beside the primary one
CLASSES_MAX: Final = 20  # with a colour each


def panels(report: Mapping[str, Any], seconds: str) -> list[Panel]:
    """The panels of a report; ``seconds`` is the unit of time, for a label."""
    metric = report["metric"] or "accuracy"
    others = [name for name in for_people(report["metrics"], metric) if name != metric][:OTHERS_MAX]
    drawn: list[Panel] = [partial(_by_version, report, metric), partial(_by_time, report, metric, seconds)]
    drawn += [partial(_by_version, report, name) for name in others]
    drawn.append(partial(_staleness, report))
    if report["local"] is not None:
        drawn.append(partial(_own, report))
    if any(row["samples"] or row["classes"] for row in report["devices"].values()):
        drawn.append(partial(_samples, report["devices"]))
    return drawn


def first_panels(report: Mapping[str, Any], seconds: str) -> list[Panel]:
    """The primary metric by version and by time, and the staleness of merged updates."""
    metric = report["metric"] or "accuracy"
    return [
        partial(_by_version, report, metric),
        partial(_by_time, report, metric, seconds),
        partial(_staleness, report),
    ]


def ranked(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The devices with the primary metric on their own data, the worst first, whatever its direction."""
    metric = report["local"]["metric"]
    sign = sign_of(direction_of(metric, report["better"]))
    reported = [(name, row) for name, row in report["devices"].items() if row["local"] is not None]
    known = [(name, row) for name, row in reported if metric in row["local"]["metrics"]]
    return sorted(known, key=lambda item: sign * item[1]["local"]["metrics"][metric])


def _text(name: str) -> str:
    """A name as it is written: what is between dollars would be a formula for matplotlib."""
    return shown_name(name).replace("$", r"\$")


def _values(report: Mapping[str, Any], metric: str) -> list[tuple[Mapping[str, Any], float]]:
    """The versions with this metric of the first evaluator, and its values."""
    found: list[tuple[Mapping[str, Any], float]] = []
    for row in report["versions"]:
        values: Mapping[str, float] = next(iter(row["evaluations"].values()), {})
        found += [(row, values[metric])] if metric in values else []
    return found


def _labelled(report: Mapping[str, Any], metric: str) -> str:
    lower = direction_of(metric, report["better"]) == LOWER
    return f"{_text(metric)}{', lower is better' if lower else ''}"


def _by_version(report: Mapping[str, Any], metric: str, axes: Any) -> None:
    known = _values(report, metric)
    axes.plot([row["version"] for row, _ in known], [value for _, value in known], marker=".", label="test")
    _local(axes, report["versions"], metric)
    axes.set(xlabel="version", ylabel=f"test {_labelled(report, metric)}", title=f"{_text(metric)} by version")


def _local(axes: Any, versions: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Plot points without lines, since different devices report each version."""
    own = [row for row in versions if row["local"] is not None and metric in row["local"]["metrics"]]
    if own:
        numbers = [row["version"] for row in own]
        for name, label, mark in (("median", "median", "_"), ("worst_decile", "worst tenth", "v")):
            values = [row["local"]["metrics"][metric][name] for row in own]
            axes.plot(numbers, values, mark, label=f"devices' own data, {label}")
        axes.legend(loc="best")  # said here and below: else matplotlib warns on a slow machine


def _by_time(report: Mapping[str, Any], metric: str, seconds: str, axes: Any) -> None:
    known = _values(report, metric)
    axes.plot([row["seconds"] for row, _ in known], [value for _, value in known], marker=".")
    title = f"{_text(metric)} by time"
    axes.set(xlabel=f"{seconds} since version 0", ylabel=f"test {_labelled(report, metric)}", title=title)


def _staleness(report: Mapping[str, Any], axes: Any) -> None:
    merged = [row for row in report["versions"] if row["staleness"] is not None]
    numbers = [row["version"] for row in merged]
    axes.plot(numbers, [row["staleness"] for row in merged], label="mean")
    axes.plot(numbers, [row["staleness_max"] for row in merged], ".", label="largest")
    axes.set(xlabel="version", ylabel="versions", title="staleness of the merged updates")
    axes.legend(loc="best")


def _own(report: Mapping[str, Any], axes: Any) -> None:
    """Each device's primary metric on its own data, of the newest version that it reported, and of its own model."""
    metric = report["local"]["metric"]
    values = [row["local"]["metrics"] for _, row in ranked(report)]
    axes.plot([each[metric] for each in values], ".", label="the federation's model")
    personal = {place: each[PERSONAL + metric] for place, each in enumerate(values) if PERSONAL + metric in each}
    if personal:
        axes.plot([*personal], [*personal.values()], "+", label="the device's own model")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="devices, the worst first", ylabel=_labelled(report, metric), title="on each device's own data")
    axes.legend(loc="best")


def _samples(devices: Mapping[str, Mapping[str, Any]], axes: Any) -> None:
    """How many samples each device trains on, by class where that is known of classes that can be told apart."""
    names = {name for row in devices.values() for name in row["classes"] or {}}
    classes = sorted(names, key=lambda name: (len(name), name))  # 10 after 9
    edges = [place - 0.5 for place in range(len(devices) + 1)]
    # a step for each device is one shape for all, where bars would be one each: ten thousand took a minute and a GB
    if classes and len(classes) <= CLASSES_MAX:
        below = [0] * len(devices)
        for name in classes:
            counts = [(row["classes"] or {}).get(name, 0) for row in devices.values()]
            top = [low + count for low, count in zip(below, counts, strict=True)]
            axes.stairs(top, edges, baseline=below, fill=True, label=_text(name))
            below = top
        axes.legend(loc="upper right", title="class", fontsize="x-small", ncols=2)
    else:
        axes.stairs([row["samples"] or 0 for row in devices.values()], edges, fill=True)
    axes.set(xlabel="devices, in the order of the scenario", ylabel="samples", title="training data")
