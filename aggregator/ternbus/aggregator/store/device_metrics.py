"""What versions are worth on the devices' own data, as those say that report it: over all devices, not only on average.

A model that is good on average can be bad for some, so the worst are shown. Every figure is a device's own word.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, fsum
from typing import Any, Final, Self

import numpy as np

ACCURACY: Final = "accuracy"
LARGEST: Final = 1e9  # whoever claims more, or less than minus it, has no metric
PERSONAL: Final = "personal_accuracy"  # of the model that the device has made for itself from the version


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A device's metrics of a version, on so many samples that it holds out."""

    device: str
    version: int
    samples: int
    values: Mapping[str, float]


def spread(values: Sequence[float]) -> dict[str, float]:
    """How something of which more is better is distributed over devices, each counting once.

    `worst_decile` is the mean of the worst tenth of the devices, rounded up to a whole number of them (as "worst 10 %"
    in Li et al. 2020, "Fair Resource Allocation in Federated Learning", section 5).
    """
    worst = sorted(values)[: ceil(len(values) / 10)]
    return {
        "worst_decile": fsum(worst) / len(worst),
        "median": float(np.median(values)),
        "mean": fsum(values) / len(values),
    }


@dataclass(slots=True, kw_only=True)
class DeviceMetrics:
    """All reports, and what they come to. A device counts with its newest report; one without accuracy does not."""

    newest: dict[str, Report] = field(default_factory=dict)
    _fine_tuned: dict[str, Report] = field(default_factory=dict)
    _accuracies: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    @classmethod
    def of(cls, reports: Iterable[Report]) -> Self:
        tests = cls()
        for report in reports:
            tests.add(report)
        return tests

    def add(self, report: Report) -> None:
        """Take in a report; a later one of the same device and version replaces it."""
        accuracies = [report.values[name] for name in (ACCURACY, PERSONAL) if name in report.values]
        if ACCURACY not in report.values or max(map(abs, accuracies)) > LARGEST:
            return
        self._accuracies[report.version][report.device] = report.values[ACCURACY]
        kept = [self.newest, self._fine_tuned] if PERSONAL in report.values else [self.newest]
        for reports in kept:
            if report.device not in reports or report.version >= reports[report.device].version:
                reports[report.device] = report

    def version(self, number: int) -> dict[str, Any] | None:
        """`devices` that have reported this version, and the `accuracy`'s spread over them; None without any."""
        found = self._accuracies.get(number)
        return {"devices": len(found), ACCURACY: spread(list(found.values()))} if found else None

    def device(self, name: str) -> dict[str, Any] | None:
        """A device's newest report."""
        report = self.newest.get(name)
        return {"version": report.version, "samples": report.samples, **report.values} if report is not None else None

    def summary(self) -> dict[str, Any] | None:
        """The spread over all devices, each with its newest report, so of versions from `oldest` to `newest`.

        `fine_tuned` are those that have made a model of their own: the spread of its accuracy, of the `gain` over the
        version, and how many it made `better`.
        """
        if not self.newest:
            return None
        versions = [report.version for report in self.newest.values()]
        accuracies = [report.values[ACCURACY] for report in self.newest.values()]
        return {
            "devices": len(self.newest),
            "oldest": min(versions),
            "newest": max(versions),
            ACCURACY: spread(accuracies),
            "fine_tuned": self._gains(),
        }

    def _gains(self) -> dict[str, Any] | None:
        if not self._fine_tuned:
            return None
        values = [report.values for report in self._fine_tuned.values()]
        gains = [each[PERSONAL] - each[ACCURACY] for each in values]
        return {
            "devices": len(gains),
            ACCURACY: spread([each[PERSONAL] for each in values]),
            "gain": spread(gains),
            "better": sum(gain > 0 for gain in gains),
        }


def sentences(summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The same for people: what is meant, and the figures."""
    if summary is None:
        return []
    oldest, newest = summary["oldest"], summary["newest"]
    when = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
    lines = [("local accuracy", f"{_shown(summary[ACCURACY], '.4f')} ({summary['devices']} devices, {when})")]
    if (tuned := summary["fine_tuned"]) is not None:
        lines += [
            ("own models", f"{_shown(tuned[ACCURACY], '.4f')} ({tuned['devices']} devices)"),
            ("their gain", f"{_shown(tuned['gain'], '+.4f')} ({tuned['better']} of {tuned['devices']} better)"),
        ]
    return lines


def _shown(values: Mapping[str, float], form: str) -> str:
    worst, middle, mean = (format(values[name], form) for name in ("worst_decile", "median", "mean"))
    return f"worst tenth {worst}, median {middle}, mean {mean}"
