"""The metrics that devices report on their own data, as a distribution over devices and not only as an average.

A model that is good on average can be bad for some, so the worst are shown. Every figure is a device's own word.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, fsum
from typing import Any, Final

import numpy as np

from ternbus.broker.plural import counted
from ternbus.broker.printable import printable
from ternbus.broker.protocol.direction import (
    HIGHER,
    LOWER,
    PERSONAL,
    Direction,
    direction_of,
    for_people,
    is_personal,
    primary_of,
    sign_of,
)

LARGEST: Final = 1e100  # whoever claims more, or less than minus it, has no such metric: sums stay finite
NAME_CHARS: Final = 40  # of a metric's name, on a screen


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A device's metrics of a version, on so many samples that it holds out."""

    device: str
    version: int
    samples: int
    values: Mapping[str, float]
    better: Mapping[str, Direction] = field(default_factory=dict)


def spread(values: Sequence[float], direction: Direction = HIGHER) -> dict[str, float]:
    """How a metric is distributed over devices, each counting once.

    `worst_decile` is the mean of the worst tenth of the devices, rounded up to a whole number of them (as "worst 10 %"
    in Li et al. 2020, "Fair Resource Allocation in Federated Learning", section 5): the highest values of a metric of
    which less is better.
    """
    worst = sorted(values, reverse=direction == LOWER)[: ceil(len(values) / 10)]
    return {
        "worst_decile": fsum(worst) / len(worst),
        "median": float(np.median(values)),
        "mean": fsum(values) / len(values),
    }


@dataclass(slots=True, kw_only=True)
class DeviceMetrics:
    """All reports, and what they come to. A device counts with its newest report; one without metrics does not."""

    newest: dict[str, Report] = field(default_factory=dict)
    _fine_tuned: dict[str, Report] = field(default_factory=dict)
    _versions: dict[int, dict[str, Mapping[str, float]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, report: Report) -> None:
        """Take in a report; a later one of the same device and version replaces it."""
        values = {name: value for name, value in report.values.items() if abs(value) <= LARGEST}
        if not (own := _own(values)):
            return
        kept = Report(
            device=report.device, version=report.version, samples=report.samples, values=values, better=report.better
        )
        self._versions[report.version][report.device] = own
        for reports in (self.newest,) if len(own) == len(values) else (self.newest, self._fine_tuned):
            if report.device not in reports or report.version >= reports[report.device].version:
                reports[report.device] = kept

    def directions(self) -> dict[str, Direction]:
        """The direction of each metric that most devices give it, in their newest reports."""
        votes: dict[str, Counter[Direction]] = defaultdict(Counter)
        for report in self.newest.values():
            for name in _own(report.values):
                votes[name][direction_of(name, report.better)] += 1
        usual = {name: direction_of(name, {}) for name in votes}
        return {name: max(usual[name], *count, key=count.__getitem__) for name, count in votes.items()}

    def metric(self) -> str | None:
        """The metric that is the primary one of most devices."""
        votes = Counter(primary_of(report.values) for report in self.newest.values())
        return votes.most_common(1)[0][0] if votes else None

    def version(self, number: int, better: Mapping[str, Direction]) -> dict[str, Any] | None:
        """`devices` that have reported this version, and each metric's spread over them; None without any."""
        found = self._versions.get(number)
        return {"devices": len(found), "metrics": _spreads(found.values(), better)} if found else None

    def device(self, name: str, better: Mapping[str, Direction]) -> dict[str, Any] | None:
        """A device's newest report, and the `gain` of the last model that it made of its own, by metric."""
        if (report := self.newest.get(name)) is None:
            return None
        tuned = self._fine_tuned.get(name)
        return {
            "version": report.version,
            "samples": report.samples,
            "metrics": dict(report.values),
            "gain": {} if tuned is None else _gain(tuned.values, better),
        }

    def summary(self, metric: str | None, better: Mapping[str, Direction]) -> dict[str, Any] | None:
        """The spread over all devices, each with its newest report, so of versions from `oldest` to `newest`.

        `metric` is the primary one. `fine_tuned` are those that have made a model of their own: for each metric the
        spread of its values, of the `gain` over the version (above 0 is better, whatever the direction), and how many
        it `improved`.
        """
        if not self.newest:
            return None
        versions = [report.version for report in self.newest.values()]
        return {
            "devices": len(self.newest),
            "oldest": min(versions),
            "newest": max(versions),
            "metric": metric,
            "metrics": _spreads([_own(report.values) for report in self.newest.values()], better),
            "fine_tuned": self._gains(better),
        }

    def _gains(self, better: Mapping[str, Direction]) -> dict[str, Any] | None:
        if not self._fine_tuned:
            return None
        reports = [report.values for report in self._fine_tuned.values()]
        after = [
            {name.removeprefix(PERSONAL): value for name, value in each.items() if is_personal(name, each)}
            for each in reports
        ]
        found = _spreads(after, better)
        gains = [_gain(each, better) for each in reports]
        for name, row in found.items():
            own = [gain[name] for gain in gains if name in gain]
            row |= {"gain": spread(own), "improved": sum(gain > 0 for gain in own)}
        return {"devices": len(reports), "metrics": found}


def _own(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the federation's model."""
    return {name: value for name, value in values.items() if not is_personal(name, values)}


def _gain(values: Mapping[str, float], better: Mapping[str, Direction]) -> dict[str, float]:
    """How much better a device's own model is than the version, by metric."""
    return {
        name: sign_of(direction_of(name, better)) * (values[PERSONAL + name] - value)
        for name, value in values.items()
        if PERSONAL + name in values
    }


def _spreads(reports: Collection[Mapping[str, float]], better: Mapping[str, Direction]) -> dict[str, dict[str, Any]]:
    """Of each metric its direction, the number of devices that have it, and its spread; the most common ones first."""
    values: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        for name, value in report.items():
            values[name].append(value)
    return {
        name: {
            "better": (direction := direction_of(name, better)),
            "devices": len(found),
            **spread(found, direction),
        }
        for name, found in sorted(values.items(), key=lambda row: -len(row[1]))
    }


def sentences(summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The same for people: what is meant, and the figures of the metrics that at least half of the devices have."""
    if summary is None:
        return []
    oldest, newest, primary = summary["oldest"], summary["newest"], summary["metric"]
    when = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
    common = {name: row for name, row in summary["metrics"].items() if 2 * row["devices"] >= summary["devices"]}
    lines = []
    for name in for_people(common, primary):
        row = common[name]
        remark = f"{counted(row['devices'], 'device')}, {when}{'; lower is better' if row['better'] == LOWER else ''}"
        lines.append((f"local {shown_name(name)}", f"{_shown(row)} ({remark})"))
    if (tuned := summary["fine_tuned"]) is not None and primary in tuned["metrics"]:
        row = tuned["metrics"][primary]
        lines += [
            ("own models", f"{_shown(row)} ({counted(row['devices'], 'device')})"),
            ("their gain", f"{_shown(row['gain'], '+')} ({row['improved']} of {row['devices']} better)"),
        ]
    return lines


def shown_name(name: str) -> str:
    """A metric's name for a screen: a peer has chosen it."""
    return printable(name[:NAME_CHARS])


def shown_value(value: float | None, sign: str = "") -> str:
    """A metric's value for a screen: four decimals, or the digits that count of a large number."""
    return "" if value is None else format(value, f"{sign}.4f" if abs(value) < 1e4 else f"{sign}.5g")


def _shown(values: Mapping[str, float], sign: str = "") -> str:
    worst, middle, mean = (shown_value(values[name], sign) for name in ("worst_decile", "median", "mean"))
    return f"worst tenth {worst}, median {middle}, mean {mean}"
