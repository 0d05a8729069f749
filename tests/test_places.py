"""The line of updates of several parts: who has room, for how long, and who waits for whom; in simulated time."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.aggregator.core.places import (
    LARGEST_AT_ONCE,
    LIFE_S,
    SILENCE_S,
    SMALL_AT_ONCE,
    Place,
    Places,
    Room,
    life_s,
)
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity, KeyId

KEY, PI = KeyId(bytes(8)), Identity.generate()
LARGEST, SMALL, PARTS = 1600, 100, 40
PAUSE_S = 30.0  # between two offers of an honest device


def places(bytes_max: int = 0, parts_max: int = PARTS) -> Places:
    """Room for two of the largest, and for 16 small ones."""
    return Places(LARGEST, bytes_max, parts_max)


def offer(line: Places, device: str, now: float, *, seq: int = 1, parts: int = 10) -> bool:
    place = line.ask(device, KEY, now, seq=seq, parts=parts)
    return place is not None and place.has_room


def send(line: Places, device: str, now: float, *, seq: int = 1, parts: int = 2, size_bytes: int = LARGEST) -> bool:
    place = line.ask(device, KEY, now, seq=seq, parts=parts, size_bytes=size_bytes)
    return place is not None and place.has_room


def turns(line: Places, now: float) -> list[str]:
    return [place.device for place in line.turns(now)]


def test_an_update_that_is_offered_to_an_idle_aggregator_has_its_place_at_once() -> None:
    line = places()
    assert offer(line, "a", 0.0)
    place = line.of("a")
    assert place is not None
    assert place.ask() == ((0, 9),)
    assert turns(line, 0.0) == []


@pytest.mark.parametrize("bytes_max", [0, 3 * LARGEST, 100 * LARGEST])
def test_two_of_the_largest_always_fit_and_sixteen_small_ones(bytes_max: int) -> None:
    line = places(bytes_max)
    assert all(offer(line, f"large-{number}", 0.0, parts=65_535) for number in range(LARGEST_AT_ONCE))
    assert all(send(line, f"small-{number}", 0.0, size_bytes=SMALL) for number in range(SMALL_AT_ONCE))
    assert line.small.bytes_max + line.large.bytes_max == max(bytes_max, 3 * LARGEST)


def test_who_has_asked_first_has_its_turn_first_whoever_asks_last() -> None:
    line = places()
    assert [offer(line, name, 0.0) for name in "abcde"] == [True, True, False, False, False]
    assert not offer(line, "e", 1.0)
    line.leave("b")
    assert turns(line, 2.0) == ["c"]
    assert turns(line, 2.0) == []
    line.leave("a")
    line.leave("c")
    assert turns(line, 3.0) == ["d", "e"]


def test_large_updates_that_never_end_keep_out_no_small_ones() -> None:
    line = places()
    assert [send(line, f"hostile-{number}", 0.0) for number in range(3)] == [True, True, False]
    assert send(line, "a", 0.0, size_bytes=SMALL)
    assert not send(line, "b", 0.0, size_bytes=SMALL + 1)  # it is not small


def test_updates_that_come_unasked_wait_for_no_room_for_parts_that_are_asked_for() -> None:
    line = places(30 * LARGEST)
    assert [offer(line, name, 0.0, parts=30) for name in "abc"] == [True, True, False]
    assert send(line, "d", 0.0)
    assert not offer(line, "e", 0.0, parts=1)  # c is before it
    assert not offer(line, "d", 1.0, seq=2, parts=1)  # it has given its place up


def test_deadlines_count_only_while_somebody_waits() -> None:
    line = places()
    assert offer(line, "slow", 0.0)
    assert offer(line, "silent", 0.0)
    assert turns(line, 10 * LIFE_S) == []
    assert line.of("slow") is not None
    place = line.of("slow")
    assert place is not None
    place.heard = 10 * LIFE_S
    assert offer(line, "a", 10 * LIFE_S)
    assert (line.of("slow"), line.of("silent")) == (None, None)


def test_who_is_silent_loses_its_place_to_who_waits_and_stands_at_the_end() -> None:
    line = places()
    assert [offer(line, name, 0.0) for name in "ab"] == [True, True]
    assert not offer(line, "c", 1.0)
    assert not offer(line, "c", SILENCE_S - 1)
    assert not offer(line, "d", SILENCE_S - 1)
    assert offer(line, "b", SILENCE_S - 1)  # which is no part
    assert offer(line, "c", SILENCE_S)
    assert turns(line, SILENCE_S) == ["c", "d"]
    assert not offer(line, "a", SILENCE_S)


def test_who_sends_a_part_now_and_then_has_its_place_no_longer_than_its_size_allows() -> None:
    line = places()
    assert [send(line, name, 0.0) for name in "ab"] == [True, True]
    second, life = 0.0, life_s(LARGEST)
    while not send(line, "c", second):
        for name in "ab":
            place = line.of(name)
            assert place is not None
            place.heard = second
        second += 10.0
    assert life <= second < life + 20.0


def test_who_waits_and_does_not_ask_again_leaves_the_line() -> None:
    line = places()
    assert [offer(line, name, 0.0) for name in "abcd"] == [True, True, False, False]
    for name in "ab":
        place = line.of(name)
        assert place is not None
        place.heard = SILENCE_S
    assert not offer(line, "d", SILENCE_S)
    assert line.of("c") is None
    line.leave("a")
    assert turns(line, SILENCE_S + 1) == ["d"]


def test_a_place_that_was_given_counts_from_then() -> None:
    line = places()
    assert [offer(line, name, 0.0) for name in "abc"] == [True, True, False]
    assert not offer(line, "c", SILENCE_S - 2)
    line.leave("a")
    assert turns(line, SILENCE_S - 1) == ["c"]
    place = line.of("c")
    assert place is not None
    assert place.until == 2 * SILENCE_S - 1


def test_a_newer_update_of_a_device_asks_anew_and_an_older_one_not_before_the_deadline() -> None:
    line = places()
    assert [offer(line, name, 0.0, seq=5) for name in "abc"] == [True, True, False]
    assert not offer(line, "a", 1.0, seq=6)
    assert turns(line, 1.0) == ["c"]
    assert line.ask("c", KEY, 2.0, seq=4, parts=10) is None
    place = line.of("c")
    assert place is not None
    assert place.seq == 5
    assert line.ask("c", KEY, 1.0 + SILENCE_S, seq=4, parts=10) is not None


@pytest.mark.parametrize(("parts", "size_bytes"), [(3, LARGEST // 2), (2, LARGEST // 2 + 1)])
def test_another_number_of_parts_or_a_larger_size_asks_anew(parts: int, size_bytes: int) -> None:
    line = places()
    assert send(line, "a", 0.0, size_bytes=LARGEST // 2)
    assert [send(line, name, 0.0) for name in "bc"] == [True, False]
    assert send(line, "a", 1.0, size_bytes=LARGEST // 2)
    assert not send(line, "a", 1.0, parts=parts, size_bytes=size_bytes)


def test_an_offered_update_gives_back_what_its_first_part_says_that_it_does_not_need() -> None:
    line = places(parts_max=1000)
    assert [offer(line, name, 0.0) for name in "abc"] == [True, True, False]
    assert send(line, "a", 1.0, parts=10, size_bytes=SMALL)
    assert turns(line, 1.0) == []
    assert send(line, "b", 1.0, parts=10, size_bytes=SMALL)
    assert turns(line, 1.0) == ["c"]
    place = line.of("a")
    assert place is not None
    assert (place.size_bytes, place.collector.bytes_max) == (SMALL, SMALL)
    assert offer(line, "a", 2.0)  # again: it has its place


def test_what_turns_out_to_be_smaller_has_its_place_for_a_shorter_time() -> None:
    line = Places(2**26, 0, 1000)
    assert [offer(line, name, 0.0) for name in "abc"] == [True, True, False]
    for name in "ab":
        place = line.of(name)
        assert place is not None
        place.heard = LIFE_S + 20.0
    assert not offer(line, "c", LIFE_S + 20.0)
    assert send(line, "a", LIFE_S + 21.0, parts=10, size_bytes=2**18)
    assert offer(line, "c", LIFE_S + 22.0)


def part(number: int, parts: int, size_bytes: int = 1024, codec: str = "ternary") -> Frame:
    frame = build(
        PI,
        federation="lab",
        sender="a",
        kind="update",
        seq=1,
        meta={"codec": codec},
        part=number,
        parts=parts,
        body=bytes(size_bytes),
    )
    return parse(frame)


def held_of(parts: int, came: Iterable[int], window: int) -> Place:
    """An update of which these parts are here."""
    place = Place(device="a", key=KEY, seq=1, parts=parts, size_bytes=2**24, heard=0.0, window=window)
    frame = part(0, parts)
    for number in came:
        place.collector.add(replace(frame, part=number))
    return place


@pytest.mark.parametrize(
    ("parts", "came", "window", "ranges"),
    [
        (7, [], 0, ((0, 6),)),
        (7, [], 5, ((0, 4),)),
        (9, [3, 4, 6, 8], 9, ((0, 2), (5, 5), (7, 7))),
        (9, [3, 4, 6], 4, ((0, 2), (5, 5))),
        (9, [0, 3], 3, ((1, 2), (4, 4))),
        (2000, range(0, 2000, 2), 2000, tuple((number, number) for number in range(1, 1000, 2))),
    ],
)
def test_a_grant_names_what_is_missing_in_at_most_500_ranges(
    parts: int, came: list[int], window: int, ranges: tuple[tuple[int, int], ...]
) -> None:
    place = held_of(parts, came, window)
    assert place.ask() == ranges
    assert place.asked == len(came) + sum(last - first + 1 for first, last in ranges)


def test_what_a_device_says_is_smaller_keeps_no_parts_of_the_larger_one() -> None:
    """Or it would hold them in room that others have: a part that is refused leaves them where they are."""
    line = Places(16_000, 0, 1000)
    for number in range(9):
        name = f"hostile-{number}"
        if not offer(line, name, 0.0, parts=20):
            break
        place = line.of(name)
        assert place is not None
        for each in range(14):
            place.collector.add(part(each, 20, codec="float32"))
        send(line, name, 0.0, parts=20, size_bytes=1000)
        with pytest.raises(ProtocolError, match="short-part"):
            place.collector.add(part(15, 20, 10))
    check_memory(line)
    assert number == 8
    assert line.take_unfinished() == 0
    line.leave("hostile-0")
    assert line.take_unfinished() == 1


# --- whatever they do


def rooms(line: Places) -> Iterable[Room]:
    return (line.small, line.large)


def with_room(line: Places) -> dict[str, Place]:
    return {name: place for room in rooms(line) for name, place in room.line.items() if place.has_room}


def check_room(line: Places) -> None:
    """Those with room fit together with all before them: so nobody passes one that waits, and memory is bounded."""
    for room in rooms(line):
        size = parts = 0
        for place in room.line.values():
            size, parts = size + place.size_bytes, parts + place.window
            fits = size <= room.bytes_max and (parts <= room.parts_max or not place.window)
            assert fits or not place.has_room
            assert place.has_room or not fits or not room.waits
        given = [place for place in room.line.values() if place.has_room]
        assert sum(place.size_bytes for place in given) <= room.bytes_max
        assert sum(place.window for place in given) <= room.parts_max
        assert room.waits == (len(given) < len(room.line))
        assert (room._bytes, room._parts) == (size, parts)


def check_memory(line: Places) -> None:
    for room in rooms(line):
        assert all(place.collector.size_bytes <= place.size_bytes for place in room.line.values())
        assert all(place.has_room or not len(place.collector) for place in room.line.values())


DEVICES = [f"d{number}" for number in range(12)]
SIZES = st.sampled_from([SMALL // 2, SMALL, SMALL + 1, LARGEST // 3, LARGEST])
STEP = st.tuples(
    st.sampled_from(["offer", "offer", "unasked", "part", "leave"]),
    st.sampled_from(DEVICES),
    st.integers(0, 2),  # a newer update
    st.sampled_from([1, 2, 15, PARTS, 65_535]),
    SIZES,
    st.sampled_from([0.0, 0.0, 1.0, 20.0, 89.0, 90.0, 300.0]),
)
Step = tuple[str, str, int, int, int, float]


def act(line: Places, step: Step, seq: int, now: float) -> None:
    what, device, _, parts, size_bytes, _ = step
    place = line.of(device)
    if what == "offer":
        offer(line, device, now, seq=seq, parts=parts)
    elif what == "unasked":
        send(line, device, now, seq=seq, parts=parts, size_bytes=size_bytes)
    elif what == "leave":
        line.leave(device)
    elif place is not None and place.has_room:
        place.heard = now


@given(st.lists(STEP, max_size=60), st.sampled_from([0, 5 * LARGEST]))
def test_all_with_a_place_fit_and_none_loses_it_by_what_others_do(steps: list[Step], bytes_max: int) -> None:
    line, now = places(bytes_max), 0.0
    for step in steps:
        what, device, seq, *_, pause = step
        now += pause
        before = with_room(line)
        alone = not any(room.line for room in rooms(line))
        act(line, step, seq, now)
        line.turns(now)
        check_room(line)
        after = with_room(line)
        lost = [place for name, place in before.items() if after.get(name) is not place]
        assert all(place.device == device or place.until <= now for place in lost)
        if alone and what in ("offer", "unasked"):
            assert device in after


@settings(max_examples=40)
@given(
    st.lists(STEP, min_size=20, max_size=60),
    st.sampled_from([None, SMALL, LARGEST]),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_an_honest_device_has_its_place_in_its_turn_whatever_all_others_do(
    steps: list[Step], size_bytes: int | None, first: int, rounds: int
) -> None:
    """The hostile ones act again and again, each 7 s; ``size_bytes`` None offers."""
    line, now = places(), 0.0
    room = line.small if size_bytes == SMALL else line.large
    at_once = SMALL_AT_ONCE if size_bytes == SMALL else LARGEST_AT_ONCE
    seqs, turn = dict.fromkeys(DEVICES, 0), cycle(steps)

    def others(count: int) -> None:
        for _ in range(count):
            step = next(turn)
            seqs[step[1]] += step[2]
            act(line, step, seqs[step[1]], now)
            for place in line.turns(now):
                place.ask()

    others(first + 15 * rounds)

    def asks() -> bool:
        place = line.ask("honest", KEY, now, seq=1, parts=10, size_bytes=size_bytes)
        assert place is not None
        return place.has_room

    has_room, began = asks(), now
    before = list(room.line).index("honest")
    asked = now
    while not has_room:
        now += 7.0
        others(3)
        place = line.of("honest")
        assert place is not None
        has_room = place.has_room
        if now - asked >= PAUSE_S and not has_room:
            has_room, asked = asks(), now
    longest = life_s(SMALL if size_bytes == SMALL else LARGEST)
    assert now - began <= (before // at_once) * (longest + PAUSE_S + 7.0)
    line.turns(now)
    while now < began + 10_000 and line.of("honest") is not None:  # it sends a part each minute, as long as it may
        held = line.of("honest")
        assert held is not None
        held.heard = now
        now += 60.0
        others(3)
        assert line.of("honest") is held or now >= held.until
        if held.since is not None and now >= held.since + longest:
            break
    assert now - began >= longest
