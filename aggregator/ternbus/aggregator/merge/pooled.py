"""The answers of devices to a request for statistics, added up, and what they come to (docs/statistics.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgpack
import numpy as np

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import statistics
from ternbus.broker.protocol.moments import Floats, Moments
from ternbus.broker.protocol.statistics import DEVICE, LABELS, MOMENTS, NONE, Measured, StatisticsRequest

NAMES_MAX: Final = 16 * statistics.FEATURES_MAX  # of features, and of labels, that devices name
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
COLUMNS: Final = ("devices", "values", "count", "first", "second")


def _zeros() -> Floats:
    return np.zeros(0)


@dataclass(slots=True, kw_only=True)
class Pooled:
    """Sums over devices, by the names of features and labels; an array has a number for each of `names`.

    `devices` counts those that have values of a feature. Without noise `first` and `second` are mean and sum of
    squared deviations, joined as in `Moments`, else sums (`Measured`).
    """

    request: StatisticsRequest
    answers: int = 0
    samples: int = 0
    names: list[str] = field(default_factory=list)
    devices: Floats = field(default_factory=_zeros)
    values: Floats = field(default_factory=_zeros)
    count: Floats = field(default_factory=_zeros)
    first: Floats = field(default_factory=_zeros)
    second: Floats = field(default_factory=_zeros)
    histogram: Floats = field(default_factory=_zeros)  # [features, bins + 2]
    labels: dict[str, list[float]] = field(default_factory=dict)  # name -> samples with it, devices that have it

    def __post_init__(self) -> None:
        self.histogram = self.histogram.reshape(-1, self._width)

    @property
    def _width(self) -> int:
        return self.request.bins + 2 if self.request.bins else 1

    def add(self, found: Measured) -> None:
        """Add a device's answer, which was read for this request. ProtocolError where it names too many things."""
        is_noisy = self.request.dp != NONE
        labels = [name for name, count in zip(found.classes, found.labels, strict=True) if is_noisy or count > 0]
        if len({*self.names, *found.features}) > NAMES_MAX or len({*self.labels, *labels}) > NAMES_MAX:
            raise ProtocolError("bad-answer", "more features or labels than are kept")
        self.answers += 1
        self.samples += found.samples
        places = self._places(found.features)
        counts = np.ones(len(places)) if is_noisy else (found.count > 0).astype(np.float64)
        self.devices[places] += counts
        self.values[places] += found.values
        if MOMENTS in self.request.kinds and not is_noisy:
            before = Moments(count=self.count[places], mean=self.first[places], squares=self.second[places])
            both = before.joined(Moments(count=found.count, mean=found.first, squares=found.second))
            self.first[places], self.second[places] = both.mean, both.squares
        elif MOMENTS in self.request.kinds:
            self.first[places] += found.first
            self.second[places] += found.second
        self.count[places] += found.count
        if self.request.bins:
            self.histogram[places] += found.rows
        for name, count in zip(found.classes, found.labels, strict=True):
            if name in labels:
                before_count, devices = self.labels.get(name, (0.0, 0))
                self.labels[name] = [before_count + float(count), devices + 1]

    def _places(self, features: Sequence[str]) -> list[int]:
        known = {name: place for place, name in enumerate(self.names)}
        if new := [name for name in features if name not in known]:
            known |= {name: len(self.names) + place for place, name in enumerate(new)}
            self.names += new
            for each in COLUMNS:
                setattr(self, each, np.concatenate([getattr(self, each), np.zeros(len(new))]))
            self.histogram = np.concatenate([self.histogram, np.zeros((len(new), self._width))])
        return [known[name] for name in features]

    def pack(self) -> bytes:
        """All of it, for the ledger."""
        arrays = {name: getattr(self, name).astype("<f8").tobytes() for name in (*COLUMNS, "histogram")}
        table = {"answers": self.answers, "samples": self.samples, "names": self.names, "labels": self.labels}
        return bytes(msgpack.packb({**table, **arrays}))

    @classmethod
    def unpack(cls, request: StatisticsRequest, content: bytes) -> Self:
        """What `pack` wrote."""
        table = msgpack.unpackb(content)
        arrays: dict[str, Any] = {
            name: np.frombuffer(table.pop(name), dtype="<f8").copy() for name in (*COLUMNS, "histogram")
        }
        return cls(request=request, **table, **arrays)

    def result(self, min_devices: int, *, is_open: bool = False) -> dict[str, Any]:
        """What all of it comes to, as JSON has it; of fewer than ``min_devices`` devices nothing.

        A feature or a label that fewer devices have is not shown, only counted in `hidden`. Without noise nothing is
        shown while the request ``is_open`` either: before and after an answer it would differ by that answer.
        """
        request = self.request
        shown = self.answers >= min_devices and not (is_open and request.dp == NONE)
        found: dict[str, Any] = {
            "request": request.id,
            "kinds": list(request.kinds),
            "dp": request.dp,
            "noise": request.noise,
            "devices": self.answers,
            "min_devices": min_devices,
            "shown": shown,
            "unit": {NONE: "values", DEVICE: "devices"}.get(request.dp, "samples"),
            "samples": None,
            "features": [],
            "labels": {},
            "hidden": 0,
        }
        if not shown:
            return found
        features = [place for place in range(len(self.names)) if self.devices[place] >= min_devices]
        labels = self._shown_labels(min_devices)
        found["samples"] = self.samples if request.dp == NONE else None
        found["features"] = [self._feature(place) for place in features]
        found["labels"] = {name: _tidy(labels[name]) for name in _ordered(labels)}
        found["hidden"] = len(self.names) - len(features) + len(self.labels) - len(labels)
        if LABELS in request.kinds and request.dp != NONE:
            found["label_noise"] = self._noise("labels")
        return found

    def _shown_labels(self, min_devices: int) -> dict[str, float]:
        """Those that enough devices have; without noise, one fewer where some are hidden.

        The samples without all labels that are shown are those with the hidden ones: of too few devices, perhaps.
        """
        labels = {name: count for name, (count, devices) in self.labels.items() if devices >= min_devices}
        if self.request.dp == NONE and 0 < len(labels) < len(self.labels):
            del labels[min(labels, key=lambda name: (labels[name], name))]
        return labels

    def _noise(self, array: str) -> float:
        """The standard deviation of the noise of a number that is added up over devices."""
        scale = statistics.scale_of(self.request, len(self.request.features) or len(self.names))
        return scale.get(array, 0.0) * math.sqrt(self.answers)

    def _feature(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "feature": self.names[place],
            "devices": int(self.devices[place]),
            "count": _tidy(float(self.count[place])),
        }
        if self.request.dp == NONE:
            row["dropped"] = int(self.values[place] - self.count[place])
        low, high = self._bounds(place)
        if MOMENTS in self.request.kinds:
            row |= self._moments(place, low, high)
        if self.request.bins:
            row |= _histogram(self.histogram[place], low, high)
            if self.request.dp != NONE:
                row["histogram_noise"] = self._noise("histogram")
        return row

    def _bounds(self, place: int) -> tuple[float, float]:
        request = self.request
        if not request.low:
            return 0.0, 0.0
        at = 0 if len(request.low) == 1 else request.features.index(self.names[place])
        return request.low[at], request.high[at]

    def _moments(self, place: int, low: float, high: float) -> dict[str, Any]:
        """Mean, variance (the population's) and standard deviation; None where nothing is left of them."""
        count, first, second = (float(each[place]) for each in (self.count, self.first, self.second))
        if count < 1:
            return {"mean": None, "variance": None, "std": None}
        if self.request.dp == NONE:
            variance = second / count
            return {"mean": first, "variance": variance, "std": math.sqrt(variance)}
        middle, half = (low + high) / 2, (high - low) / 2
        mean = min(max(first / count, -1.0), 1.0)
        variance = half**2 * max(min(second / count, 1.0) - mean**2, 0.0)
        noise = half * self._noise("first") / count
        return {"mean": middle + half * mean, "variance": variance, "std": math.sqrt(variance), "mean_noise": noise}


def _ordered(labels: Mapping[str, float]) -> list[str]:
    """Numbers in their order, then names in theirs."""
    return sorted(labels, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _tidy(count: float) -> float | int:
    return int(count) if count == int(count) else count


def _histogram(row: Floats, low: float, high: float) -> dict[str, Any]:
    bins = len(row) - 2
    edges = [low + (high - low) * place / bins for place in range(bins)] + [high]
    return {
        "edges": edges,
        "bins": [_tidy(float(each)) for each in row[1:-1]],
        "below": _tidy(float(row[0])),
        "above": _tidy(float(row[-1])),
        "quantiles": {str(share): quantile(row, edges, share) for share in QUANTILES},
        "quantile_error": (high - low) / bins,
    }


def quantile(row: Floats, edges: Sequence[float], share: float) -> float | None:
    """The value below which this share lies, by a histogram of [below, bins…, above]; None outside of the bounds.

    Values are taken as evenly spread in their bin, so it is at most a bin's width from the true one.
    """
    counts = np.maximum(row, 0.0)
    if not (total := float(counts.sum())):
        return None
    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, share * total))
    if place == 0 or place >= len(row) - 1:
        return None
    within = (share * total - ends[place - 1]) / counts[place]
    return float(edges[place - 1] + within * (edges[place] - edges[place - 1]))
