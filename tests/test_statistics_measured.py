"""What statistics of data come to: moments without loss of digits, histograms, noise, and what is refused."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.aggregator.merge import pooled as pooling
from ternbus.aggregator.merge.pooled import Pooled, quantile
from ternbus.aggregator.shell.statistics_command import lines
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import statistics
from ternbus.broker.protocol.moments import Moments, total
from ternbus.broker.protocol.statistics import HISTOGRAM, LABELS, MOMENTS, OTHERS, Measured, StatisticsRequest
from ternbus.edge.learn import measure
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.subnetwork import NarrowTrainer

RNG = np.random.default_rng(3)
DATA = RNG.normal(1e6, 2.0, (600, 3))
CLASSES = RNG.integers(0, 4, 600)
Array = npt.NDArray[Any]
measured: Any = measure.measured  # of what is no whole trainer
measured_with_noise: Any = measure.measured_with_noise


class Data:
    """A trainer of which only the data matter."""

    def __init__(self, inputs: Array, labels: Array | None = None, **about: Any) -> None:
        self.inputs, self.labels = inputs, labels
        vars(self).update(about)

    @property
    def samples(self) -> int:
        return len(self.inputs)

    @property
    def class_counts(self) -> Mapping[str, int]:
        if self.labels is None:
            return {}
        names, counts = np.unique(self.labels, return_counts=True)
        return dict(zip(map(str, names.tolist()), counts.tolist(), strict=True))

    def measured_inputs(self) -> Iterator[Array]:
        yield self.inputs[: len(self.inputs) // 2]
        yield self.inputs[len(self.inputs) // 2 :]


def request(*kinds: str, **fields: Any) -> StatisticsRequest:
    bins: dict[str, Any] = {"bins": 16} if HISTOGRAM in kinds and "bins" not in fields else {}
    return StatisticsRequest(id=7, kinds=kinds or (MOMENTS,), **bins, **fields)


def result(wanted: StatisticsRequest, *parts: Any, min_devices: int = 2) -> dict[str, Any]:
    """By the bytes of each answer, and through the ledger's form in between."""
    found = Pooled(request=wanted)
    for part in parts:
        if wanted.dp == "none":
            answer = measured(part, wanted)
        else:
            answer, failure = measured_with_noise(part, wanted, RandomSource())
            assert not failure
        found.add(Measured.read(answer.pack(), wanted))
        found = Pooled.unpack(wanted, found.pack())
    return found.result(min_devices)


def parts(count: int = 3) -> list[Data]:
    return [Data(rows, labels) for rows, labels in zip(np.split(DATA, count), np.split(CLASSES, count), strict=True)]


def test_mean_and_variance_are_those_of_all_data_far_from_zero() -> None:
    found = result(request(MOMENTS, LABELS), *parts())
    assert found["samples"] == 600
    for place, row in enumerate(found["features"]):
        column = DATA[:, place]
        assert (row["feature"], row["count"], row["dropped"], row["devices"]) == (str(place), 600, 0, 3)
        assert row["mean"] == pytest.approx(column.mean(), rel=1e-12)
        assert row["variance"] == pytest.approx(column.var(), rel=1e-6)
        assert row["std"] == pytest.approx(column.std(), rel=1e-6)
    assert found["labels"] == {str(name): CLASSES.tolist().count(name) for name in range(4)}


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=8), min_size=1, max_size=5))
def test_moments_of_parts_are_those_of_the_whole(rows: list[list[float]]) -> None:
    joined = total((Moments.of(np.array(row).reshape(-1, 1)) for row in rows), 1)
    whole = np.array([value for row in rows for value in row])
    assert joined.count[0] == whole.size
    if whole.size:
        assert joined.mean[0] == pytest.approx(whole.mean(), rel=1e-9, abs=1e-6)
        assert joined.variance[0] == pytest.approx(whole.var(), rel=1e-6, abs=1e-3)


def test_what_is_not_finite_is_dropped_and_counted() -> None:
    rows = DATA.copy()
    rows[5, 1], rows[6, 1], rows[7, 1] = np.nan, np.inf, 1e101
    found = result(request(), Data(rows[:300]), Data(rows[300:]))
    assert [row["dropped"] for row in found["features"]] == [0, 3, 0]
    assert found["features"][1]["mean"] == pytest.approx(np.delete(DATA[:, 1], [5, 6, 7]).mean(), rel=1e-12)
    nothing = result(request(), *[Data(np.full((20, 1), np.nan))] * 2)
    assert (nothing["features"], nothing["hidden"]) == ([], 1)  # no device has a value of it
    alone = result(request(), Data(np.full((20, 1), np.nan)), min_devices=0)
    assert alone["features"][0]["mean"] is None


def test_histogram_and_quantiles_have_the_stated_error() -> None:
    wanted = request(HISTOGRAM, low=(1e6 - 5,), high=(1e6 + 5,), bins=50)
    for place, row in enumerate(result(wanted, *parts())["features"]):
        column = DATA[:, place]
        counts, edges = np.histogram(column, 50, (1e6 - 5, 1e6 + 5))
        assert row["bins"] == counts.tolist()
        assert row["edges"] == pytest.approx(edges)
        assert (row["below"], row["above"]) == ((column < 1e6 - 5).sum(), (column > 1e6 + 5).sum())
        assert row["quantile_error"] == pytest.approx(0.2)
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            exact = np.quantile(column, share, method="inverted_cdf")
            assert abs(row["quantiles"][str(share)] - exact) <= row["quantile_error"]


def test_a_quantile_outside_of_the_bounds_is_none() -> None:
    edges = [0.0, 1.0, 2.0]
    assert quantile(np.array([9.0, 1.0, 0.0, 0.0]), edges, 0.5) is None
    assert quantile(np.array([0.0, 1.0, 0.0, 9.0]), edges, 0.5) is None
    assert quantile(np.zeros(4), edges, 0.5) is None
    assert quantile(np.array([0.0, 2.0, 2.0, 0.0]), edges, 0.75) == pytest.approx(1.5)


def test_features_have_names_bounds_and_an_axis() -> None:
    images = RNG.uniform(size=(40, 2, 5, 5)).astype(np.float32)
    channels = result(request(), Data(images), Data(images), min_devices=1)["features"]
    assert [row["count"] for row in channels] == [2000, 2000]
    assert channels[1]["mean"] == pytest.approx(images[:, 1].mean(dtype=np.float64))
    (single,) = result(request(), Data(images, feature_axis=0), min_devices=1)["features"]
    assert (single["feature"], single["count"]) == ("value", 2000)
    named = Data(DATA, feature_names=("a", "b", "c"))
    wanted = request(HISTOGRAM, features=("c", "a"), low=(0.0, 1e6), high=(1.0, 1e6 + 1), bins=1)
    c, a = result(wanted, named, min_devices=1)["features"]
    assert (c["feature"], a["feature"], c["edges"], a["edges"]) == ("c", "a", [0.0, 1.0], [1e6, 1e6 + 1])
    assert a["bins"] == [int(((DATA[:, 0] >= 1e6) & (DATA[:, 0] <= 1e6 + 1)).sum())]
    flat = result(request(), Data(DATA[:, 0]), min_devices=1)["features"]
    assert flat[0]["mean"] == pytest.approx(DATA[:, 0].mean())


def test_a_narrow_trainer_has_the_data_of_the_full_one() -> None:
    full: Any = Data(DATA, feature_names=("a", "b", "c"))
    narrow: Any = NarrowTrainer(full, {})
    assert [row["feature"] for row in result(request(), narrow, min_devices=1)["features"]] == ["a", "b", "c"]
    with pytest.raises(AttributeError):
        _ = narrow.train_privately


@pytest.mark.parametrize(
    ("data", "wanted", "words"),
    [
        (Data(DATA[:9]), request(), "fewer than 10 samples"),
        (Data(DATA), request(LABELS), "no labels"),
        (Data(DATA, np.array(["x" * 65] * 600)), request(LABELS), "too long"),
        (Data(DATA), request(features=("9",)), "no feature '9'"),
        (Data(DATA, feature_names=("a", "a", "b")), request(), "feature_names"),
        (Data(np.zeros((20, 1025))), request(), "1025 features"),
        (Data(np.zeros((20, 1024))), request(HISTOGRAM, low=(0.0,), high=(1.0,), bins=256), "ask for some of them"),
        (Data(np.array([["a"]] * 20)), request(), "no array of numbers"),
        (type("Bare", (), {"samples": 20})(), request(), "measured_inputs"),
    ],
)
def test_what_has_no_statistics_is_refused_in_words(data: Any, wanted: StatisticsRequest, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        measured(data, wanted)


def test_no_samples_are_refused_in_words() -> None:
    data: Any = Data(DATA)
    data.measured_inputs = lambda: iter(())
    with pytest.raises(ConfigError, match="no samples"):
        measured(data, request())


def test_labels_that_are_named_count_the_others_together() -> None:
    found = result(request(LABELS, labels=("1", "9")), *parts())
    assert found["labels"] == {"1": int((CLASSES == 1).sum()), OTHERS: int((CLASSES != 1).sum())}
    assert found["hidden"] == 0  # nobody has a 9


def test_nothing_is_shown_of_too_few_devices() -> None:
    first, second = Data(DATA[:300], CLASSES[:300]), Data(DATA[300:], np.full(300, 7))
    one = result(request(MOMENTS, LABELS), first)
    assert (one["shown"], one["features"], one["labels"], one["samples"]) == (False, [], {}, None)
    both = result(request(MOMENTS, LABELS), first, second)
    assert both["labels"] == {}  # each label is on one device
    assert both["hidden"] == 5
    other = result(request(), first, Data(DATA[:, :1], feature_names=("extra",)))
    assert (other["devices"], other["features"], other["hidden"]) == (2, [], 4)


def test_a_hidden_label_is_not_what_is_left_of_the_samples() -> None:
    """All samples less those with a label that is shown would be those of the one device that has the hidden label."""
    first, second = Data(DATA[:300], np.repeat([0, 1, 2], 100)), Data(DATA[300:], np.repeat([0, 1], [250, 50]))
    found = result(request(LABELS), first, second)
    assert found["labels"] == {"0": 350}
    assert (found["samples"], found["hidden"]) == (600, 2)


# --- with noise


@pytest.mark.parametrize("dp", ["sample", "device"])
def test_little_noise_leaves_the_statistics(dp: str) -> None:
    wanted = request(MOMENTS, HISTOGRAM, LABELS, low=(1e6 - 8,), high=(1e6 + 8,), labels=("0", "1", "2", "3"), dp=dp,
                     noise=1e-6)  # fmt: skip
    found = result(wanted, *parts())
    assert found["samples"] is None
    scale = 1 if dp == "sample" else 1 / 200
    for place, row in enumerate(found["features"]):
        assert "dropped" not in row
        assert row["mean"] == pytest.approx(DATA[:, place].mean(), rel=1e-9)
        assert row["variance"] == pytest.approx(DATA[:, place].var(), rel=0.01)
        assert row["mean_noise"] < 1e-3
        assert sum(row["bins"]) == pytest.approx(600 * scale, rel=1e-3)
    assert found["labels"]["2"] == pytest.approx((CLASSES == 2).sum() * scale, rel=1e-3)


def test_the_noise_is_the_gaussian_mechanism_for_what_one_sample_changes() -> None:
    """Scaled by their noise, all arrays together change by at most 1 / noise in L2 norm when a sample is left out."""
    wanted = request(
        MOMENTS, HISTOGRAM, LABELS, low=(-1.0,), high=(1.0,), bins=4, labels=("0",), dp="sample", noise=2.0
    )
    scale = statistics.scale_of(wanted, 3)
    assert set(scale) == {"count", "first", "second", "histogram", "labels"}
    silent = RandomSource(lambda count: b"\xff" * count)  # its uniform numbers are 1: all normal ones are 0
    rows, labels = np.full((20, 3), 1e9), np.zeros(20, int)
    whole, _ = measured_with_noise(Data(rows, labels), wanted, silent)
    less, _ = measured_with_noise(Data(rows[:-1], labels[:-1]), wanted, silent)
    change = [(getattr(whole, name) - getattr(less, name)) / deviation for name, deviation in scale.items()]
    length = math.sqrt(sum(float(np.square(each).sum()) for each in change))
    assert 0.99 / 2.0 < length <= 1 / 2.0


def test_the_answer_of_a_device_is_bounded_by_what_its_noise_is_for() -> None:
    wanted = request(MOMENTS, HISTOGRAM, low=(-1.0,), high=(1.0,), bins=4, dp="device", noise=2.0)
    silent = RandomSource(lambda count: b"\xff" * count)
    found, _ = measured_with_noise(Data(np.full((50, 3), -1e9)), wanted, silent)
    scale = statistics.scale_of(wanted, 3)
    length = math.sqrt(sum(float(np.square(getattr(found, name) / each).sum()) for name, each in scale.items()))
    assert 0.99 / 2.0 < length <= 1 / 2.0


def test_a_trainer_that_has_more_rows_or_labels_than_samples_is_bounded_too() -> None:
    class Few(Data):
        samples = 5

    wanted = request(
        MOMENTS, HISTOGRAM, LABELS, low=(-1.0,), high=(1.0,), bins=4, labels=("0",), dp="device", noise=2.0
    )
    silent = RandomSource(lambda count: b"\xff" * count)
    found, _ = measured_with_noise(Few(np.full((50, 3), -1e9), np.zeros(50, int)), wanted, silent)
    scale = statistics.scale_of(wanted, 3)
    length = math.sqrt(sum(float(np.square(getattr(found, name) / each).sum()) for name, each in scale.items()))
    assert 0.99 / 2.0 < length <= 1 / 2.0


def test_noise_has_its_deviation() -> None:
    wanted = request(MOMENTS, low=(-1.0,), high=(1.0,), dp="sample", noise=3.0)
    found, _ = measured_with_noise(Data(np.zeros((20, 900))), wanted, RandomSource())
    assert np.std(found.first) == pytest.approx(statistics.scale_of(wanted, 900)["first"], rel=0.15)


def test_failing_code_gives_noise_alone_and_says_why_at_home() -> None:
    class Failing(Data):
        def measured_inputs(self) -> Iterator[Array]:
            yield self.inputs
            raise ValueError("row 3 of patient 7")

    wanted = request(MOMENTS, HISTOGRAM, low=(0.0,), high=(1.0,), dp="device", noise=1e-9)
    found, why = measured_with_noise(Failing(np.ones((20, 2))), wanted, RandomSource())
    assert why == "ValueError: row 3 of patient 7"
    assert np.abs(found.first).max() < 1e-6
    assert found.histogram.shape == (36,)

    class Mute(Data):
        def measured_inputs(self) -> Iterator[Array]:
            raise ValueError("no file")

    with pytest.raises(ConfigError, match="log says why"):
        measured_with_noise(Mute(DATA), wanted, RandomSource())
    named = replace(wanted, features=("0",))
    assert measured_with_noise(Mute(DATA), named, RandomSource())[1] == "ValueError: no file"
    with pytest.raises(ConfigError, match="read by code"):
        measured_with_noise(
            Data(DATA, inputs_at_random=False),
            replace(wanted, dp="sample"),
            RandomSource(),
        )


def test_the_text_states_the_noise_of_labels_and_of_bins() -> None:
    wanted = request(
        MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,), bins=4, labels=("0", "1"), dp="sample", noise=1e-3
    )
    found = result(wanted, *parts())
    told = "\n".join(lines({**found, "open": False, "refused": {}, "invalid": {}, "unanswered": []}))
    assert f"noise of the count of a label: {found['label_noise']:.6g}" in told
    assert "histogram_noise" in told
    assert f" {found['features'][0]['histogram_noise']:.6g} " in told


def test_only_labels_with_noise() -> None:
    wanted = request(LABELS, labels=("0", "1"), dp="sample", noise=1e-9)
    found = result(wanted, *parts())
    assert found["label_noise"] < 1e-6
    assert found["labels"]["0"] == pytest.approx((CLASSES == 0).sum(), abs=1e-3)
    with pytest.raises(ConfigError, match="no labels"):
        measured_with_noise(Data(DATA), wanted, RandomSource())


# --- what is no request, and no answer


@pytest.mark.parametrize(
    "fields",
    [
        {"kinds": ()},
        {"kinds": ("moments", "moments")},
        {"kinds": ("rows",)},
        {"kinds": ("histogram",)},
        {"kinds": ("histogram",), "bins": 4},
        {"bins": 4, "low": (0.0,), "high": (1.0,)},
        {"low": (0.0,)},
        {"low": (1.0,), "high": (1.0,)},
        {"low": (0.0,), "high": (1e101,)},
        {"low": (0.0, 0.0), "high": (1.0, 1.0)},
        {"dp": "sample"},
        {"noise": 1.0},
        {"dp": "sample", "noise": 1.0},
        {"kinds": ("labels",), "dp": "device", "noise": 1.0},
    ],
)
def test_nonsense_is_no_request(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        StatisticsRequest(**{"id": 1, "kinds": ("moments",), **fields})


ANSWER = measured(Data(DATA, CLASSES), request(MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,)))


@pytest.mark.parametrize(
    "changes",
    [
        {"count": -ANSWER.count},
        {"count": ANSWER.count + 0.5},
        {"count": ANSWER.count + 1},
        {"count": np.full(3, np.nan)},
        {"first": np.full(3, np.inf)},
        {"first": np.full(3, 1e101)},
        {"first": np.zeros(4)},
        {"second": np.full(3, -1.0)},
        {"histogram": ANSWER.histogram[:-1]},
        {"histogram": ANSWER.histogram * 2},
        {"labels": ANSWER.labels * 2},
        {"labels": ANSWER.labels[:-1]},
        {"samples": -1},
        {"samples": 2**32},
        {"values": 1},
        {"features": ()},
        {"features": ("a", "a", "b")},
        {"features": ("a\x1b", "b", "c")},
        {"features": ("a", "b", "c" * 65)},
        {"classes": ("0", "0", "1", "2")},
        {"refusal": "x" * 201},
    ],
)
def test_an_answer_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    wanted = request(MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,))
    assert Measured.read(ANSWER.pack(), wanted).samples == 600
    with pytest.raises(ProtocolError):
        Measured.read(replace(ANSWER, **changes).pack(), wanted)


def test_an_answer_must_be_to_the_request() -> None:
    for other in (
        request(MOMENTS, LABELS),
        request(MOMENTS, HISTOGRAM, low=(0.0,), high=(1.0,)),
        request(MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,), features=("0",)),
        request(MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,), labels=("0",)),
        request(MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,), labels=("0",), dp="sample", noise=1.0),
        request(MOMENTS, HISTOGRAM, low=(0.0,), high=(1.0,), dp="sample", noise=1.0),
    ):
        with pytest.raises(ProtocolError):
            Measured.read(ANSWER.pack(), other)
    noisy = request(MOMENTS, low=(0.0,), high=(1.0,), dp="sample", noise=1.0)
    found, _ = measured_with_noise(Data(DATA), noisy, RandomSource())
    with pytest.raises(ProtocolError):
        Measured.read(replace(found, count=np.full(3, 2.0**61)).pack(), noisy)
    with pytest.raises(ProtocolError):
        Measured.read(replace(found, samples=3).pack(), noisy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x91\x00",
        b"\x81\xa7refusal\xa0",
        b"\x81\xa7refusal\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\0" * 65_537,
    ],
)
def test_bytes_that_are_no_answer_are_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        Measured.read(content, request())


def test_names_are_bounded_over_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "NAMES_MAX", 4)
    found = Pooled(request=request())
    found.add(measured(Data(DATA), request()))
    with pytest.raises(ProtocolError, match="more features"):
        found.add(measured(Data(DATA, feature_names=("a", "b", "c")), request()))
    assert found.answers == 1
