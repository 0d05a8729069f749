"""Statistics of a device's own samples: what it answers to a request (docs/statistics.md), with noise where it asks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import statistics
from ternbus.broker.protocol.moments import Floats, Moments, usable
from ternbus.broker.protocol.statistics import OTHERS, Measured, StatisticsRequest
from ternbus.edge.learn.class_counts import class_counts_of
from ternbus.edge.learn.noise import ROUNDING, RandomSource
from ternbus.edge.learn.task import Trainer
from ternbus.edge.learn.task_loader import code_errors

CHUNK: Final = 2**20  # values that are looked at together
SAMPLES_MIN: Final = 10  # without noise: of fewer samples an answer shows single ones
OF_DATA: Final = ("measured_inputs", "feature_names", "feature_axis", "inputs_at_random")
ONLY: Final = "value"  # the name of the feature of inputs without an axis of features


class MeasuredTrainer(Protocol):
    """A trainer that gives the inputs of its samples to statistics; optional beside `Trainer`.

    An attribute `feature_names` names the features, else they are numbers from 0. `feature_axis` is the axis of the
    features, by default 1: columns of a table, channels of images in PyTorch's order; 0 makes all values of a sample
    one feature.
    """

    def measured_inputs(self) -> Iterable[npt.NDArray[Any]]:
        """The inputs as the model takes them, in arrays with a row for each sample; the other axes are always as long.

        Raises `ConfigError` for inputs that are no arrays of numbers.
        """
        ...


@dataclass(slots=True, kw_only=True)
class _Sums:
    """What is added up over the samples; `names` are those of the features that were asked for."""

    names: tuple[str, ...] = ()
    samples: int = 0
    values: int = 0  # of each feature, with those that do not count
    moments: Moments | None = None
    count: Floats = field(default_factory=lambda: np.zeros(0))
    first: Floats = field(default_factory=lambda: np.zeros(0))
    second: Floats = field(default_factory=lambda: np.zeros(0))
    histogram: Floats = field(default_factory=lambda: np.zeros(0))


def measured(trainer: Trainer, request: StatisticsRequest) -> Measured:
    """The statistics of a trainer's data, without noise. Raises `ConfigError`, in words, where there are none."""
    sums, labels = _Sums(), _labels(trainer, request)
    if request.measures:
        for values in _inputs(trainer, request, sums):
            _add_plain(sums, values, request)
        _check_size(request, sums.names, labels[0])
    samples = sums.samples if request.measures else trainer.samples
    if samples < SAMPLES_MIN:
        raise ConfigError(f"it has fewer than {SAMPLES_MIN} samples, which an answer would show")
    moments = sums.moments or Moments.none(0)
    wanted = statistics.MOMENTS in request.kinds
    return Measured(
        samples=samples,
        values=sums.values,
        features=sums.names,
        count=moments.count,
        first=moments.mean if wanted else np.zeros(0),
        second=moments.squares if wanted else np.zeros(0),
        histogram=sums.histogram,
        classes=labels[0],
        labels=labels[1],
    )


def measured_with_noise(
    trainer: Trainer, request: StatisticsRequest, random_source: RandomSource
) -> tuple[Measured, str]:
    """The same with the request's noise, and why the task's code failed, for the device's own log.

    A failure, which may depend on the data, becomes the noise of nothing. Raises `ConfigError` for what follows from
    task and request alone.
    """
    sums, failure, labels = _Sums(names=request.features), "", (request.labels, np.zeros(len(request.labels) + 1))
    if request.dp == statistics.SAMPLE and not getattr(trainer, "inputs_at_random", True):
        raise ConfigError('its samples are read by code, which may fail for one of them: dp = "sample" has no answer')
    try:
        labels = _labels(trainer, request)
        for values in _inputs(trainer, request, sums) if request.measures else ():
            _add_bounded(sums, values, request)
    except ConfigError:
        raise
    except code_errors() as error:
        failure = f"{type(error).__name__}: {error}"
        features = len(sums.names)
        if request.measures and not features:
            raise ConfigError("its data cannot be read; the device's log says why") from error
        sums = _emptied(replace(sums, samples=1), features, request)
        labels = (labels[0], np.zeros(len(labels[0])))
    if request.measures and not sums.count.size:
        sums = _emptied(sums, len(sums.names), request)
    _check_size(request, sums.names, labels[0])
    return _noisy(sums, labels, request, trainer.samples if not failure else 1, random_source), failure


def _noisy(
    sums: _Sums, labels: tuple[tuple[str, ...], Floats], request: StatisticsRequest, samples: int, source: RandomSource
) -> Measured:
    # of rows or labels there may be more than the trainer says samples: no mean may go beyond what the noise is for
    most = max(samples, sums.samples, int(labels[1].sum()), 1)
    per = ROUNDING / (most if request.dp == statistics.DEVICE else 1)
    exact: dict[str, Floats] = {
        "count": sums.count,
        "first": sums.first,
        "second": sums.second,
        "histogram": sums.histogram,
        "labels": labels[1],
    }
    deviations = statistics.scale_of(request, len(sums.names))
    noisy: dict[str, Any] = {
        name: exact[name] * per + deviations[name] * source.normal(exact[name].size) for name in deviations
    }
    classes = (*request.labels, OTHERS) if statistics.LABELS in request.kinds else ()
    return Measured(features=sums.names, classes=classes, **noisy)


def _emptied(sums: _Sums, features: int, request: StatisticsRequest) -> _Sums:
    zeros = np.zeros(features)
    bins = np.zeros(features * (request.bins + 2) if request.bins else 0)
    return replace(sums, count=zeros, first=zeros.copy(), second=zeros.copy(), histogram=bins)


def _labels(trainer: Trainer, request: StatisticsRequest) -> tuple[tuple[str, ...], Floats]:
    """Labels and how many samples have each; of those that are not named, where some are, under `OTHERS`."""
    if statistics.LABELS not in request.kinds:
        return (), np.zeros(0)
    if not (counts := class_counts_of(trainer)):
        raise ConfigError("its task has no labels that can be counted: it needs class_counts, of at most 256 classes")
    if request.labels:
        named = [counts.get(name, 0) for name in request.labels]
        return (*request.labels, OTHERS), np.array([*named, sum(counts.values()) - sum(named)], dtype=np.float64)
    if odd := next((name for name in counts if not statistics.is_name(name)), None):
        raise ConfigError(f"it has a label that is too long or not printable: {odd[:20]!r}")
    return tuple(counts), np.array(list(counts.values()), dtype=np.float64)


def _inputs(trainer: Trainer, request: StatisticsRequest, sums: _Sums) -> Iterator[Floats]:
    """The inputs as [samples, values, features]; the first sets the names of the features."""
    read: Callable[[], Iterable[npt.NDArray[Any]]] | None = getattr(trainer, "measured_inputs", None)
    if read is None:  # `MeasuredTrainer`, which does not see what `NarrowTrainer` passes on
        raise ConfigError("its task gives no inputs to statistics: the trainer needs measured_inputs()")
    given: Sequence[str] = getattr(trainer, "feature_names", ())
    axis = int(getattr(trainer, "feature_axis", 1))
    chosen: list[int] | None = None
    for array in read():
        cube = _cube(np.asarray(array), axis)
        if chosen is None:
            names = _names(given, cube.shape[2])
            chosen = _chosen(names, request.features)
            sums.names, sums.values = tuple(names[each] for each in chosen), 0
        rows = max(1, CHUNK // max(1, cube.shape[1] * cube.shape[2]))
        for first in range(0, len(cube), rows):
            part = cube[first : first + rows]
            sums.samples += len(part)
            sums.values += part.shape[0] * part.shape[1]
            yield part[:, :, chosen]
    if chosen is None:
        raise ConfigError("it has no samples")


def _cube(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """An array with a row for each sample as [samples, values, features]."""
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise ConfigError(f"its inputs are {array.dtype}, no array of numbers")
    if array.ndim == 1 or axis == 0:
        return array.reshape(len(array), -1, 1)
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(len(array), -1, moved.shape[-1])


def _names(given: Sequence[str], features: int) -> list[str]:
    if features > statistics.FEATURES_MAX:
        raise ConfigError(f"its inputs have {features} features, more than {statistics.FEATURES_MAX}")
    names = [str(each) for each in given] or ([ONLY] if features == 1 else [str(each) for each in range(features)])
    if len(names) != features or len(set(names)) < features or not all(map(statistics.is_name, names)):
        raise ConfigError(f"its feature_names are not {features} different names of at most 64 bytes")
    return names


def _chosen(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    if missing := [name for name in wanted if name not in names]:
        known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ConfigError(f"its inputs have no feature {missing[0]!r}; they have {known}")
    return [names.index(name) for name in wanted] if wanted else list(range(len(names)))


def _check_size(request: StatisticsRequest, names: Sequence[str], classes: Sequence[str]) -> None:
    size = statistics.size_of(request, len(names), len(classes))
    size += sum(len(name.encode()) + 2 for name in (*names, *classes))
    if size > statistics.CONTENT_BYTES_MAX:
        raise ConfigError(
            f"{len(names)} features make an answer of {size} bytes, more than {statistics.CONTENT_BYTES_MAX}: ask "
            "for some of them by name, or for fewer bins"
        )


def _add_plain(sums: _Sums, values: Floats, request: StatisticsRequest) -> None:
    flat = values.reshape(-1, values.shape[2])
    found = Moments.of(flat)
    sums.moments = found if sums.moments is None else sums.moments.joined(found)
    if request.bins:
        _add_histogram(sums, flat, request, 1.0)


def _add_bounded(sums: _Sums, values: Floats, request: StatisticsRequest) -> None:
    """Add for each sample its mean of z and z², and the shares of its values in the bins: each at most 1 in size."""
    features, each = values.shape[2], 1 / max(1, values.shape[1])
    if not sums.count.size:
        _start(sums, features)
    low, high = request.bounds(features)
    found, fits = usable(values)
    with np.errstate(over="ignore", invalid="ignore"):
        z = np.where(fits, np.clip((2 * found - low - high) / (high - low), -1.0, 1.0), 0.0)
    sums.count += fits.sum((0, 1)) * each
    sums.first += z.sum((0, 1)) * each
    sums.second += np.square(z).sum((0, 1)) * each
    if request.bins:
        _add_histogram(sums, values.reshape(-1, features), request, each)


def _start(sums: _Sums, features: int) -> None:
    sums.count, sums.first, sums.second = (np.zeros(features) for _ in range(3))


def _add_histogram(sums: _Sums, flat: Floats, request: StatisticsRequest, each: float) -> None:
    features, bins = flat.shape[1], request.bins
    low, high = request.bounds(features)
    found, fits = usable(flat)
    inside = np.clip(np.floor((found - low) / (high - low) * bins), -1, bins)
    place = np.where(found == high, bins - 1, inside) + 1 + np.arange(features) * (bins + 2)
    counts: Floats = each * np.bincount(place[fits].astype(np.int64), minlength=features * (bins + 2)).astype(
        np.float64
    )
    sums.histogram = counts if not sums.histogram.size else sums.histogram + counts
