"""Each robust rule against its paper, written a second time: one coordinate, one device, one number after another."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.small_world import accepted_update, float32_block, ternary_block
from ternbus.aggregator.merge import mean, robust
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.merge.mean import Mean
from ternbus.aggregator.merge.robust import Buffered, cap, gather, trimmed
from ternbus.aggregator.settings import RULES, MergeSettings
from ternbus.broker.protocol.schema import Schema, Tensor
from ternbus.broker.protocol.ternary import Block

SCHEMA = Schema.write(
    [
        Tensor("w", (13,), "ternary"),
        Tensor("b", (4,), "dense"),
        Tensor("v", (9,), "ternary"),
        Tensor("c", (2,), "dense"),
    ]
)
ROBUST = [rule for rule in RULES if rule != "mean"]


@cache
def block_of(seed: int, ternary: bool) -> Block:
    return ternary_block(SCHEMA, seed) if ternary else float32_block(SCHEMA, seed)


@cache
def value_of(seed: int, ternary: bool) -> list[float]:
    return [float(element) for element in block_of(seed, ternary).value()]


@dataclass(frozen=True)
class Sent:
    """An update as somebody sent it."""

    device: str
    seed: int
    samples: int
    discount: float
    ternary: bool

    @property
    def update(self) -> AcceptedUpdate:
        return accepted_update(self.device, samples=self.samples, discount=self.discount)

    @property
    def block(self) -> Block:
        return block_of(self.seed, self.ternary)

    @property
    def value(self) -> list[float]:
        return value_of(self.seed, self.ternary)


buffers = st.lists(
    st.builds(
        Sent,
        device=st.sampled_from("abcdefgh"),
        seed=st.integers(0, 10_000),
        samples=st.integers(1, 2**32 - 1),
        discount=st.floats(0.01, 1),
        ternary=st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def merged(about: MergeSettings, buffer: list[Sent]) -> mean.Change:
    gathered = gather(about, SCHEMA)
    for sent in buffer:
        gathered.add(sent.update, sent.block)
    return gathered.result()


# --- the second implementation


def plain_device_means(buffer: list[Sent]) -> list[list[float]]:
    """The mean of each device's discounted updates, in the order in which devices came."""
    means = []
    for device in dict.fromkeys(sent.device for sent in buffer):
        own = [sent for sent in buffer if sent.device == device]
        means.append([sum(sent.discount * sent.value[k] for sent in own) / len(own) for k in range(SCHEMA.elements)])
    return means


def plain_trimmed(means: list[list[float]], leave: int) -> list[float]:
    result = []
    for k in range(SCHEMA.elements):
        values = sorted(each[k] for each in means)
        kept = values[leave : len(values) - leave]
        result.append(sum(kept) / len(kept))
    return result


def plain_median(means: list[list[float]]) -> list[float]:
    """Yin et al. 2018, definition 1: the middle value, or the mean of the two in the middle."""
    result = []
    for k in range(SCHEMA.elements):
        values = sorted(each[k] for each in means)
        half = len(values) // 2
        result.append(values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2)
    return result


def plain_scores(means: list[list[float]], f: int) -> list[float]:
    """Blanchard et al. 2017, section 4: the sum of squared distances to the n - f - 2 closest others."""
    n = len(means)
    scores = []
    for i in range(n):
        apart = [sum((a - b) ** 2 for a, b in zip(means[i], means[j], strict=True)) for j in range(n) if j != i]
        scores.append(sum(sorted(apart)[: n - f - 2]))
    return scores


def plain_mean(means: list[list[float]]) -> list[float]:
    return [sum(each[k] for each in means) / len(means) for k in range(SCHEMA.elements)]


def length(vector: list[float]) -> float:
    return math.sqrt(sum(element**2 for element in vector))


def close(delta: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)
    assert delta.dtype == np.float32


# --- rules


@given(buffers)
@settings(max_examples=80, deadline=None)
def test_the_median_of_each_coordinate(buffer: list[Sent]) -> None:
    close(merged(MergeSettings(rule="median"), buffer).delta, plain_median(plain_device_means(buffer)))


@given(buffers, st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.4, 0.49]))
@settings(max_examples=80, deadline=None)
def test_the_trimmed_mean_of_each_coordinate(buffer: list[Sent], trim: float) -> None:
    means = plain_device_means(buffer)
    leave = 0
    while leave < trim * len(means) - 1e-9 and 2 * (leave + 1) < len(means):
        leave += 1
    close(merged(MergeSettings(rule="trimmed-mean", trim=trim), buffer).delta, plain_trimmed(means, leave))


@given(buffers, st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=120, deadline=None)
def test_krum_and_multi_krum_take_who_is_closest_to_the_others(buffer: list[Sent], f: int, keep: int) -> None:
    means = plain_device_means(buffer)
    n = len(means)
    for rule in ("krum", "multi-krum"):
        delta = merged(MergeSettings(rule=rule, byzantine=f, krum_keep=keep), buffer).delta
        if n < 3:
            close(delta, plain_mean(means))
            continue
        bearable = min(f, (n - 3) // 2)
        scores = plain_scores(means, bearable)
        wanted = 1 if rule == "krum" else min(keep or n, n - bearable)
        ranked = sorted(range(n), key=lambda i: scores[i])
        if wanted < n and scores[ranked[wanted]] - scores[ranked[wanted - 1]] < 1e-5 * scores[ranked[wanted]]:
            continue  # who comes next is a matter of rounding
        close(delta, plain_mean([means[i] for i in ranked[:wanted]]))


@given(buffers, st.sampled_from([0.0, 0.01, 0.3, 100.0]))
@settings(max_examples=80, deadline=None)
def test_norm_clip_scales_longer_means_down(buffer: list[Sent], most: float) -> None:
    """Sun et al. 2019: the mean of x / max(1, |x| / M)."""
    means = plain_device_means(buffer)
    lengths = sorted(length(each) for each in means)
    half = len(lengths) // 2
    bound = most or (lengths[half] if len(lengths) % 2 else (lengths[half - 1] + lengths[half]) / 2)
    clipped = [[element / max(1.0, length(each) / bound) for element in each] for each in means]
    close(merged(MergeSettings(rule="norm-clip", clip_norm=most), buffer).delta, plain_mean(clipped))


@given(buffers, st.sampled_from([0.05, 0.2, 0.34, 0.5, 0.9]))
@settings(max_examples=80, deadline=None)
def test_no_device_has_more_than_its_share_of_the_samples(buffer: list[Sent], share: float) -> None:
    totals: dict[str, float] = {}
    for sent in buffer:
        totals[sent.device] = totals.get(sent.device, 0) + sent.samples
    allowed = max(share, 1 / len(totals))
    low, high = 0.0, float(max(totals.values()))
    for _ in range(200):  # the largest c that keeps everybody within it, by halving
        middle = (low + high) / 2
        cut = [min(total, middle) for total in totals.values()]
        low, high = (middle, high) if max(cut) <= allowed * sum(cut) * (1 + 1e-12) else (low, middle)
    samples = [sent.samples * min(1.0, low / totals[sent.device]) for sent in buffer]
    expected = [
        sum(n * sent.discount * sent.value[k] for n, sent in zip(samples, buffer, strict=True)) / sum(samples)
        for k in range(SCHEMA.elements)
    ]
    close(merged(MergeSettings(max_share=share), buffer).delta, expected)


def test_a_cap_by_hand() -> None:
    assert cap([100, 100, 800], 0.5) == 200
    assert cap([1, 1, 1, 97], 0.4) == pytest.approx(2)
    assert cap([5, 7], 0.1) == 5
    assert cap([5, 7], 0.9) >= 7


@pytest.mark.parametrize("rule", RULES)
@given(buffers)
@settings(max_examples=40, deadline=None)
def test_the_weights_say_what_each_update_was_given(rule: str, buffer: list[Sent]) -> None:
    """Delta = sum of weight times update where a rule is linear; each coordinate's own sum averages to it elsewhere."""
    change = merged(MergeSettings(rule=rule, max_share=0.3 if rule == "mean" else 1.0), buffer)
    assert len(change.weights) == len(buffer)
    assert all(0 <= weight <= sent.discount + 1e-9 for weight, sent in zip(change.weights, buffer, strict=True))
    if rule in ("median", "trimmed-mean"):
        shares = [weight / sent.discount for weight, sent in zip(change.weights, buffer, strict=True)]
        assert sum(shares) == pytest.approx(1)
        return
    total = [
        sum(weight * sent.value[k] for weight, sent in zip(change.weights, buffer, strict=True))
        for k in range(SCHEMA.elements)
    ]
    close(change.delta, total)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@given(buffers)
@settings(max_examples=40, deadline=None)
def test_devices_whose_means_are_equal_share_the_weight(rule: str, buffer: list[Sent]) -> None:
    means = np.array(plain_device_means(buffer), dtype=np.float32)
    n = len(means)
    leave = (n - 1) // 2 if rule == "median" else trimmed(0.2, n)
    expected = [0.0] * n
    for k in range(SCHEMA.elements):
        kept = sorted(means[:, k])[leave : n - leave]
        for value in kept:
            same = [i for i in range(n) if means[i, k] == value]
            for i in same:
                expected[i] += 1 / len(same) / len(kept) / SCHEMA.elements
    change = merged(MergeSettings(rule=rule), buffer)
    devices = list(dict.fromkeys(sent.device for sent in buffer))
    for device, share in zip(devices, expected, strict=True):
        own = [place for place, sent in enumerate(buffer) if sent.device == device]
        mean_share = sum(change.weights[place] / buffer[place].discount for place in own)
        assert mean_share == pytest.approx(share, abs=0.02)  # a value may fall on either side of another by rounding


def test_what_krum_left_out_has_no_weight() -> None:
    honest = [Sent(name, 1, 10, 1.0, ternary=False) for name in "abcd"]
    change = merged(MergeSettings(rule="multi-krum", byzantine=1), [*honest, Sent("evil", 2, 2**32 - 1, 1.0, True)])
    assert change.weights == (0.25, 0.25, 0.25, 0.25, 0.0)


@pytest.mark.parametrize("rule", ROBUST)
def test_a_device_counts_once_however_much_it_sends_and_claims(rule: str) -> None:
    """Five updates of four billion samples each, on five versions, count as one device of five."""
    honest = [Sent(name, 1, 10, 1.0, ternary=False) for name in "abcd"]
    far = [Sent("evil", seed, 2**32 - 1, 1.0, ternary=False) for seed in range(2, 7)]
    change = merged(MergeSettings(rule=rule, byzantine=1), [*far, *honest])
    own = np.array(honest[0].value)
    assert sum(change.weights[:5]) <= 0.25
    mean_of_all = 0.8 * own + 0.2 * np.mean([sent.value for sent in far], axis=0)
    assert length(list(change.delta - own)) <= length(list(mean_of_all - own)) + 1e-6
    if rule != "norm-clip":
        close(change.delta, list(own))


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4, unique=True), st.sampled_from([1.0, -1.0, 1e4, -1e4]))
@settings(max_examples=30, deadline=None)
def test_one_of_five_cannot_leave_the_honest_ones_range(rule: str, seeds: list[int], size: float) -> None:
    honest = [float32_block(SCHEMA, seed) for seed in seeds]
    evil = Block.of_float32(SCHEMA, np.full(SCHEMA.elements, size, dtype=np.float32))
    gathered = gather(MergeSettings(rule=rule, byzantine=1), SCHEMA)
    for place, each in enumerate([evil, *honest]):
        gathered.add(accepted_update(str(place)), each)
    values = np.array([each.value() for each in honest])
    delta = gathered.result().delta
    assert (delta >= values.min(axis=0) - 1e-5).all()
    assert (delta <= values.max(axis=0) + 1e-5).all()


# --- fewer devices than the rule was set up for


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ternary", [False, True])
def test_one_update_alone_is_what_is_merged(rule: str, ternary: bool) -> None:
    alone = Sent("a", 3, 7, 0.5, ternary)
    change = merged(MergeSettings(rule=rule, byzantine=2), [alone])
    close(change.delta, [0.5 * element for element in alone.value])
    assert change.weights == (0.5,)


@pytest.mark.parametrize("rule", ROBUST)
def test_two_devices_cannot_be_told_apart(rule: str) -> None:
    pair = [Sent("a", 3, 7, 1.0, ternary=False), Sent("b", 4, 700, 1.0, ternary=False)]
    change = merged(MergeSettings(rule=rule, byzantine=2, clip_norm=1e6), pair)
    close(change.delta, plain_mean(plain_device_means(pair)))


def test_trimming_rounds_up_and_leaves_something() -> None:
    assert [trimmed(0.2, count) for count in (1, 2, 3, 4, 5, 6, 10, 11)] == [0, 0, 1, 1, 1, 2, 2, 3]
    assert [trimmed(0.49, count) for count in (1, 2, 3, 4, 100)] == [0, 0, 1, 1, 49]
    assert trimmed(0.07, 100) == 7  # not 8, though 0.07 * 100 is above 7 in binary


# --- memory and bits


@pytest.mark.parametrize("rule", [*ROBUST, "mean"])
def test_how_much_is_unpacked_at_a_time_changes_nothing(rule: str) -> None:
    buffer = [Sent("abcdefg"[seed % 7], seed, 5 + seed, 1 / (1 + seed), seed % 2 == 0) for seed in range(9)]
    about = MergeSettings(rule=rule, byzantine=1, max_share=0.5 if rule == "mean" else 1.0)
    whole = merged(about, buffer)
    for work_bytes in (1, 32 * 7 * 3, 32 * 7 * 5):
        gathered = Buffered(about, SCHEMA, work_bytes)
        for sent in buffer:
            gathered.add(sent.update, sent.block)
        again = gathered.result()
        np.testing.assert_allclose(again.delta, whole.delta, rtol=1e-5, atol=1e-7)
        assert again.weights == pytest.approx(whole.weights)


@given(st.integers(0, 1000), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_piece_of_a_block_is_that_piece_of_its_value(seed: int, ternary: bool, data: st.DataObject) -> None:
    block = ternary_block(SCHEMA, seed) if ternary else float32_block(SCHEMA, seed)
    segment = data.draw(st.sampled_from(SCHEMA.segments))
    first = data.draw(st.integers(0, segment.tensor.elements - 1))
    last = data.draw(st.integers(first + 1, segment.tensor.elements))
    expected = block.value()[segment.start + first : segment.start + last]
    assert block.piece(segment, first, last).tobytes() == expected.tobytes()


def test_the_plain_mean_keeps_no_blocks() -> None:
    assert isinstance(gather(MergeSettings(), SCHEMA), Mean)
    assert isinstance(gather(MergeSettings(max_share=0.9), SCHEMA), Buffered)
    assert isinstance(gather(MergeSettings(rule="median"), SCHEMA), Buffered)


def test_a_cap_has_the_same_bits_with_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on sum() compensates for rounding: a ledger of before would be replayed to other versions."""
    buffer = [Sent(f"d{number}", number, number + 3, 1.0, True) for number in range(7)]
    buffer += [Sent("d0", number, 1000 + number, 1.0, True) for number in range(5)]
    monkeypatch.setattr(robust, "sum", math.fsum, raising=False)
    change = merged(MergeSettings(max_share=0.3), buffer)
    total = sum(sent.samples for sent in buffer if sent.device == "d0")
    most = cap([total, *(number + 3 for number in range(1, 7))], 0.3)
    samples = [sent.samples * min(1.0, most / total) if sent.device == "d0" else float(sent.samples) for sent in buffer]
    added = 0.0
    for each in samples:
        added += each
    assert added != math.fsum(samples)
    assert list(change.weights) == [each / added for each in samples]
