"""Messages in parts: cut, sent in any order and more than once, joined again, within a limit of memory."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import LinkError, ProtocolError
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.broker.protocol.parts import PART_BYTES_MIN, Collector, Whole, cut

PI = Identity(bytes(range(32)))
META = {"base": 3}


def sent(body: bytes, frame_bytes: int = 2000, seq: int = 7, meta: dict[str, int] | None = None) -> list[Frame]:
    frames = cut(
        PI,
        federation="lab",
        sender="pi",
        kind="update",
        seq=seq,
        meta=META if meta is None else meta,
        body=body,
        frame_bytes=frame_bytes,
    )
    assert all(len(frame) <= frame_bytes for frame in frames)
    return [parse(frame) for frame in frames]


def part(number: int, of: int, body: bytes = bytes(PART_BYTES_MIN), seq: int = 1) -> Frame:
    """A frame as if parsed: the collector is given authentic ones only."""
    return Frame(
        kind="update",
        federation="lab",
        sender="pi",
        key=KeyId(bytes(8)),
        seq=seq,
        part=number,
        parts=of,
        digest=b"",
        meta={},
        meta_bytes=b"",
        header=b"",
        signature=b"",
        body=body,
    )


def collect(collector: Collector, frames: Iterable[Frame]) -> list[Whole]:
    return [whole for frame in frames if (whole := collector.add(frame)) is not None]


@given(size=st.integers(0, 30_000), frame_bytes=st.integers(1300, 9000), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_a_message_is_joined_from_its_parts_in_any_order(size: int, frame_bytes: int, seed: int) -> None:
    chance = random.Random(seed)
    body = chance.randbytes(size)
    frames = sent(body, frame_bytes)
    assert all(len(frame.body) >= PART_BYTES_MIN for frame in frames[:-1])
    assert b"".join(frame.body for frame in frames) == body
    twice = [*frames, *frames[: len(frames) - 1]]
    chance.shuffle(twice)
    collector = Collector(4, 10**6)
    first, *_ = collect(collector, twice)
    assert (first.body, first.seq, first.parts, first.meta) == (body, 7, len(frames), META)
    assert (first.kind, first.federation, first.sender, first.key) == ("update", "lab", "pi", PI.key_id)


def test_a_message_that_fits_is_one_part() -> None:
    (frame,) = sent(bytes(100))
    assert (frame.part, frame.parts) == (0, 1)
    collector = Collector(0, 0)
    assert collect(collector, [frame])[0].body == bytes(100)


def test_frames_too_small_for_parts_may_be_larger_at_another_time() -> None:
    with pytest.raises(LinkError, match="maximum packet size"):
        sent(bytes(5000), 1200)
    with pytest.raises(LinkError, match="more than 65535 frames"):
        sent(bytes(80_000_000), 1300)


def test_the_first_copy_of_a_part_wins() -> None:
    collector = Collector(4, 10**6)
    (whole,) = collect(collector, [part(0, 2, b"a" * 1024), part(0, 2, b"b" * 1024), part(1, 2, b"c")])
    assert whole.body == b"a" * 1024 + b"c"


def test_only_what_agrees_belongs_together() -> None:
    body = bytes(3000)
    one, other = sent(body, seq=1), sent(body, seq=2)
    third = sent(body, seq=1, meta={"base": 4})
    collector = Collector(9, 10**6)
    assert collect(collector, [one[0], other[1], third[1], part(1, 2, seq=1)]) == []
    assert len(collector) == 4
    assert collector.missing("update", 2) == [0]
    assert list(collector.missing_ranges("update", 2)) == [(0, 0)]
    assert collector.missing("update", 9) == collector.missing("delta", 2) == []
    assert collect(collector, [one[1]])[0].body == body


def test_every_part_but_the_last_carries_enough() -> None:
    collector = Collector(4, 10**6)
    with pytest.raises(ProtocolError, match="short-part"):
        collector.add(part(0, 2, bytes(PART_BYTES_MIN - 1)))
    assert len(collector) == 0
    collector.add(part(1, 2, b""))
    assert collect(collector, [part(0, 2)])[0].body == bytes(PART_BYTES_MIN)


def test_a_part_longer_than_all_that_is_allowed_is_refused() -> None:
    with pytest.raises(ProtocolError, match="too-long"):
        Collector(4, 5000).add(part(0, 2, bytes(5001)))


def test_thousands_of_messages_never_finished_are_dropped_oldest_first() -> None:
    collector = Collector(4, 10**6)
    for seq in range(5000):
        assert collector.add(part(0, 3, seq=seq)) is None
    assert (len(collector), collector.dropped, collector.size_bytes) == (4, 4996, 4 * 1024)
    assert collect(collector, [part(1, 3, seq=4996), part(2, 3, b"x", seq=4996)])[0].seq == 4996
    collector.clear()
    assert (len(collector), collector.size_bytes, collector.dropped) == (0, 0, 4999)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(1024, 3000)), max_size=60))
@settings(max_examples=100)
def test_the_bounds_hold_whatever_comes(parts: list[tuple[int, int, int]]) -> None:
    collector = Collector(3, 9000)
    for seq, number, size in parts:
        collector.add(part(number, 6, bytes(size), seq=seq))
        assert len(collector) <= 3
        assert collector.size_bytes <= 9000
        held = [len(body) for assembly in collector._assemblies.values() for body in assembly.bodies.values()]
        assert collector.size_bytes == sum(held)
