"""Federated statistics: what an aggregator asks devices of their data, in a head, and what one of them answers.

See docs/protocol.md, section 11.13.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self

import msgpack
import numpy as np

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.messages import CLASSES_MAX, SAMPLES_MAX
from ternbus.broker.protocol.moments import LARGEST, Floats
from ternbus.broker.protocol.packed import NO_EXTENSIONS, check_whole

KEY: Final = "statistics"  # of a head
MOMENTS, HISTOGRAM, LABELS = "moments", "histogram", "labels"
KINDS: Final = (MOMENTS, HISTOGRAM, LABELS)
NONE, SAMPLE, DEVICE = "none", "sample", "device"  # what the noise of an answer protects
PROTECTED: Final = (NONE, SAMPLE, DEVICE)
NAMED_MAX: Final = 64  # features, and labels, by name in a request
NAME_BYTES_MAX: Final = 64
REQUEST_BYTES_MAX: Final = 6144  # of the map in a head, whose header has 16,384
FEATURES_MAX: Final = 1024
BINS_MAX: Final = 256
CONTENT_BYTES_MAX: Final = 65_536  # of an answer, before it is sealed
REFUSAL_BYTES_MAX: Final = 200
VALUES_MAX: Final = 2**53  # the integers that a float64 has
NOISY_MAX: Final = 2.0**60  # the magnitude of what has noise
SQUARES_MAX: Final = VALUES_MAX * (2 * LARGEST) ** 2
OTHERS: Final = "(others)"  # label of what has none of the labels that were asked for
FIELDS: Final = (
    "samples", "values", "features", "count", "first", "second", "histogram", "classes", "labels",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRequest:
    """What is asked. `features` and `labels` name some; without names it is all. ProtocolError for nonsense.

    `low` and `high` are bounds: none, one pair for all features, or one for each named feature. `bins` is 0 without
    a histogram. `noise` is the noise multiplier, 0 where `dp` is "none".
    """

    id: int  # higher than those of all requests before
    kinds: tuple[str, ...]
    features: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    bins: int = 0
    labels: tuple[str, ...] = ()
    dp: str = NONE
    noise: float = 0.0

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise ProtocolError("bad-request", fault)

    def _fault(self) -> str:
        pairs = len(self.low)
        if not self.kinds or any(kind not in KINDS for kind in self.kinds) or len(set(self.kinds)) < len(self.kinds):
            return f"the kinds are not some of {', '.join(KINDS)}"
        if pairs != len(self.high) or pairs not in {0, 1, len(self.features)}:
            return "the bounds are not none, one pair, or one for each feature that is named"
        if not all(low < high and max(-low, high) <= LARGEST for low, high in zip(self.low, self.high, strict=True)):
            return "a lower bound is not below its upper bound"
        if (self.bins > 0) != (HISTOGRAM in self.kinds) or (self.bins and not pairs):
            return "a histogram needs bins and bounds, and nothing else has bins"
        if (self.dp == NONE) != (self.noise == 0):
            return "noise goes with dp, and dp with noise"
        if self.dp != NONE and self.measures and not pairs:
            return "with dp, features need bounds: what one sample changes is unlimited without them"
        if self.dp != NONE and LABELS in self.kinds and not self.labels:
            return "with dp, labels must be named: which ones a device has depends on its data"
        return ""

    @property
    def measures(self) -> bool:
        """Whether features are looked at."""
        return MOMENTS in self.kinds or HISTOGRAM in self.kinds

    def bounds(self, features: int) -> tuple[Floats, Floats]:
        """Lower and upper bounds, arrays [features]."""
        low, high = (np.array(each, dtype=np.float64) for each in (self.low, self.high))
        return np.broadcast_to(low, (features,)), np.broadcast_to(high, (features,))

    def meta(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kinds": list(self.kinds),
            "features": list(self.features),
            "low": list(self.low),
            "high": list(self.high),
            "bins": self.bins,
            "labels": list(self.labels),
            "dp": self.dp,
            "noise": self.noise,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        """Check the map of a head."""
        return cls(
            id=meta_fields.counter(meta, "id", 1),
            kinds=_names(meta, "kinds", len(KINDS)),
            features=_names(meta, "features", NAMED_MAX),
            low=_numbers(meta, "low"),
            high=_numbers(meta, "high"),
            bins=meta_fields.integer(meta, "bins", 0, BINS_MAX),
            labels=_names(meta, "labels", NAMED_MAX),
            dp=meta_fields.one_of(meta, "dp", PROTECTED),
            noise=meta_fields.number(meta, "noise", 0.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsAnswer:
    """The message of a device. Its body is a sealed box, as an update's: key id, seq, and a `Measured`."""

    KIND: ClassVar[str] = KEY
    request: int

    def meta(self) -> dict[str, Any]:
        return {"request": self.request}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(request=meta_fields.counter(meta, "request", 1))


_EMPTY: Final = np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """The content of an answer: the statistics of a device's data, or why it gives none.

    Arrays are float64, [features]; `histogram` has bins + 2 numbers for each feature, one after the other: below the
    lower bound first, then the bins, last what is above. Without noise `first` is the mean and `second` the sum of
    squared deviations from it, `count` and `labels` are numbers of values and samples, and `samples` and `values` those
    of all, a feature's values that do not count included. With noise, and z = (2x - low - high) / (high - low) cut to
    -1 … 1, `count` is the sum over samples of the share of values that count, `first` and `second` are sums of a
    sample's mean of z and of z²; with `dp` "device" they are means over its samples, as histogram and labels are.
    """

    samples: int = 0
    values: int = 0
    features: tuple[str, ...] = ()
    count: Floats = field(default_factory=_EMPTY.copy)
    first: Floats = field(default_factory=_EMPTY.copy)
    second: Floats = field(default_factory=_EMPTY.copy)
    histogram: Floats = field(default_factory=_EMPTY.copy)
    classes: tuple[str, ...] = ()
    labels: Floats = field(default_factory=_EMPTY.copy)
    refusal: str = ""

    def pack(self) -> bytes:
        """The content's bytes."""
        if self.refusal:
            return bytes(msgpack.packb({"refusal": self.refusal}))
        return bytes(msgpack.packb({name: _packed(getattr(self, name)) for name in FIELDS}))

    @classmethod
    def read(cls, content: bytes, request: StatisticsRequest) -> "Measured":
        """The answer to a request in ``content``; ProtocolError for anything that is none."""
        fields = _map(content)
        if tuple(fields) == ("refusal",):
            refusal = meta_fields.line(fields, "refusal", REFUSAL_BYTES_MAX)
            if not refusal:
                raise ProtocolError("bad-answer", "a refusal without a reason")
            return cls(refusal=refusal)
        if tuple(fields) != FIELDS:
            raise ProtocolError("bad-answer", f"not a map of {', '.join(FIELDS)}")
        arrays: dict[str, Any] = {
            name: _array(fields, name) for name in ("count", "first", "second", "histogram", "labels")
        }
        found = cls(
            samples=meta_fields.integer(fields, "samples", 0, SAMPLES_MAX),
            values=meta_fields.integer(fields, "values", 0, VALUES_MAX),
            features=_names(fields, "features", FEATURES_MAX),
            classes=_names(fields, "classes", CLASSES_MAX),
            **arrays,
        )
        if fault := _fault(found, request):
            raise ProtocolError("bad-answer", fault)
        return found

    @property
    def rows(self) -> Floats:
        """The histogram, [features, bins + 2]."""
        return self.histogram.reshape(len(self.features), -1)


def size_of(request: StatisticsRequest, features: int, classes: int) -> int:
    """About how many bytes the content of an answer has, without the names."""
    columns = 1 + 2 * (MOMENTS in request.kinds) + (request.bins + 2 if request.bins else 0)
    return 8 * (features * columns * request.measures + classes) + 128


def _fault(found: Measured, request: StatisticsRequest) -> str:
    """What does not agree with the request, or with itself."""
    features = len(found.features)
    wanted = {
        "count": features if request.measures else 0,
        "first": features if MOMENTS in request.kinds else 0,
        "second": features if MOMENTS in request.kinds else 0,
        "histogram": features * (request.bins + 2) if request.bins else 0,
        "labels": len(found.classes),
    }
    for name, length in wanted.items():
        if getattr(found, name).shape != (length,):
            return f"{name!r} does not have {length} numbers"
    if request.measures != bool(features) or (request.features and found.features != request.features):
        return "the features are not those that were asked for"
    if found.classes and LABELS not in request.kinds:
        return "labels were not asked for"
    if LABELS in request.kinds and request.labels and found.classes != (*request.labels, OTHERS):
        return "the labels are not those that were asked for"
    return _odd_plain(found, request) if request.dp == NONE else _odd_noisy(found)


def _odd_noisy(found: Measured) -> str:
    arrays = (found.count, found.first, found.second, found.histogram, found.labels)
    if found.samples or found.values:
        return "numbers without noise"
    return "a number is beyond 2^60" if any((np.abs(each) > NOISY_MAX).any() for each in arrays) else ""


def _odd_plain(found: Measured, request: StatisticsRequest) -> str:
    for name in ("count", "histogram", "labels"):
        numbers = getattr(found, name)
        if (numbers < 0).any() or (numbers > VALUES_MAX).any() or (numbers != np.floor(numbers)).any():
            return f"{name!r} has what is no number of values"
    if (found.count > found.values).any() or found.labels.sum() > found.samples:
        return "more values than there are, or more labels than samples"
    if (np.abs(found.first) > LARGEST).any() or (found.second < 0).any() or (found.second > SQUARES_MAX).any():
        return "a mean or a sum of squares is out of range"
    if request.bins and (found.rows.sum(1) != found.count).any():
        return "a histogram does not have all values"
    return ""


def _map(content: bytes) -> Mapping[str, Any]:
    if len(content) > CONTENT_BYTES_MAX:
        raise ProtocolError("bad-answer", f"{len(content)} bytes, at most {CONTENT_BYTES_MAX}")
    try:
        check_whole(content)
        fields = msgpack.unpackb(
            content, strict_map_key=True, max_array_len=FEATURES_MAX, max_map_len=len(FIELDS), **NO_EXTENSIONS
        )
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError("bad-answer", "not one msgpack map") from error
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ProtocolError("bad-answer", "not one msgpack map")
    return fields


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<f8").tobytes()
    return list(value) if isinstance(value, tuple) else value


def _array(fields: Mapping[str, Any], name: str) -> Floats:
    value = meta_fields.get(fields, name)
    if not isinstance(value, bytes) or len(value) % 8:
        raise ProtocolError("bad-answer", f"{name!r} is not an array of float64")
    found = np.frombuffer(value, dtype="<f8").astype(np.float64)
    if not np.isfinite(found).all():
        raise ProtocolError("bad-answer", f"{name!r} has a number that is not finite")
    return found


def _names(meta: Mapping[str, Any], key: str, most: int) -> tuple[str, ...]:
    value = meta_fields.get(meta, key)
    if not isinstance(value, list) or len(value) > most or not all(isinstance(name, str) for name in value):
        raise ProtocolError("bad-meta", f"{key!r} is not an array of at most {most} names")
    if any(not name.isprintable() or not 0 < len(name.encode()) <= NAME_BYTES_MAX for name in value):
        raise ProtocolError("bad-meta", f"{key!r} has a name that is empty, too long, or not printable")
    if len(set(value)) < len(value):
        raise ProtocolError("bad-meta", f"{key!r} has a name twice")
    return tuple(value)


def _numbers(meta: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = meta_fields.get(meta, key)
    if not isinstance(value, list) or len(value) > NAMED_MAX:
        raise ProtocolError("bad-meta", f"{key!r} is not an array of at most {NAMED_MAX} numbers")
    return tuple(meta_fields.checked_number(number, key) for number in value)


def is_name(name: str) -> bool:
    """Whether a feature or a label may be called so."""
    return name.isprintable() and 0 < len(name.encode("utf-8", "replace")) <= NAME_BYTES_MAX


def scale_of(request: StatisticsRequest, features: int) -> dict[str, float]:
    """The standard deviation of the noise of each array of an answer: the Gaussian mechanism, Dwork & Roth 2014, A.1.

    Each array is one of b blocks. What is protected changes a block by an L2 norm of at most its bound: the square root
    of the number of features, or 1 for the labels. Divided by bound and by the root of b, all of them together have a
    sensitivity of 1, and the noise is `noise` of it.
    """
    each = math.sqrt(features)
    bounds = {
        "count": each if request.measures else 0.0,
        "first": each if MOMENTS in request.kinds else 0.0,
        "second": each if MOMENTS in request.kinds else 0.0,
        "histogram": each if request.bins else 0.0,
        "labels": 1.0 if LABELS in request.kinds else 0.0,
    }
    blocks = sum(bound > 0 for bound in bounds.values())
    return {name: request.noise * bound * math.sqrt(blocks) for name, bound in bounds.items() if bound > 0}
