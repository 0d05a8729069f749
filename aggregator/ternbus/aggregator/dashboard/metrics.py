"""An aggregator's metrics in the text format of Prometheus; the only module that imports `prometheus_client`."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.dashboard.families import COUNTER, FAMILIES, VERSIONS, Family, Seen, Values
from ternbus.aggregator.shell import administration, examination
from ternbus.broker.errors import ConfigError
from ternbus.broker.server import refusals
from ternbus.broker.version import software

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:  # an extra: devices and small servers do not need it
    raise ConfigError("metrics need the package prometheus-client; run: pip install 'ternbus[dashboard]'") from error

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, eq=False)  # the registry keeps it by identity
class _Collected(Collector):
    seen: Seen

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            if samples := family.samples(self.seen):
                metric = _made(family)
                for labels, value in samples:
                    metric.add_metric(labels, value)
                yield metric


def _made(family: Family) -> CounterMetricFamily | GaugeMetricFamily:
    maker = CounterMetricFamily if family.kind == COUNTER else GaugeMetricFamily
    return maker(family.name, family.help, labels=family.labels)


def exposition(directory: Path) -> tuple[bytes, str]:
    """The metrics of a directory, whether or not a process serves it: (body, content type).

    A running process is asked to write down what it knows; if it does not answer, this takes 20 s. ConfigError or
    StorageError where the directory cannot be read.
    """
    looked = examination.look(directory, VERSIONS)
    settings = administration.load_settings(directory)
    registry = CollectorRegistry()  # our own: the global one has metrics of this process
    seen = Seen(
        now=time.time(),
        software=software().removeprefix("ternbus "),
        found=looked.found,
        health=looked.health,
        settings=settings,
        broker_refused=_broker_refused(examination.broker_folder(directory, settings)),
    )
    registry.register(_Collected(seen))
    return generate_latest(registry), CONTENT_TYPE


def _broker_refused(folder: Path | None) -> Values | None:
    """By reason; None where the broker counts none, or its directory is another user's."""
    if folder is None:
        return None
    totals: dict[str, float] = {}
    try:
        for row in json.loads((folder / refusals.FILE).read_text(encoding="utf-8"))["refused"]:
            totals[row["reason"]] = totals.get(row["reason"], 0.0) + float(row["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return totals
