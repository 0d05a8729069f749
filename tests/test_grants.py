"""Offers of large updates, and the grants that answer them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from support.small_world import (
    Bench,
    float32_block,
    frames_of,
    published,
    receipts,
    refusals,
)
from ternbus.aggregator.core import events
from ternbus.aggregator.core.grants import Grants, ranges
from ternbus.broker.protocol.messages import Grant

Make = Callable[..., Bench]


def grants(actions: list[events.Action]) -> list[Grant]:
    return [Grant.from_meta(frame.meta) for frame in frames_of(actions, "grant")]


def test_parts_beyond_the_direct_ones_are_dropped_unless_they_were_granted(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    limits = replace(bench.core.settings.limits, direct_parts=2)  # as if the model were a large one
    bench.core._frames.settings = replace(bench.core.settings, limits=limits)
    wide = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert len(wide) == 3
    assert published(bench.receive(pi.topic("update"), wide[0])) == []
    assert refusals(bench.tick(1.0)) == {"not-granted": 1}
    (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
    assert (grant.device, grant.device_key, grant.seq, grant.parts) == ("pi", pi.identity.key_id, pi.seq, ((0, 2),))
    assert grant.deadline_s > 0
    bench.receive(pi.topic("update"), wide[1])
    (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
    assert grant.parts == ((0, 0), (2, 2))
    bench.receive(pi.topic("update"), wide[0])
    (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
    assert grant.parts == ((2, 2),)
    (receipt,) = receipts(bench.receive(pi.topic("update"), wide[2]))
    assert (receipt.outcome, receipt.seq) == ("accepted", pi.seq)


def test_a_grant_names_at_most_500_ranges_and_joins_what_adjoins() -> None:
    assert ranges([]) == ()
    assert ranges(list(range(7))) == ((0, 6),)
    assert ranges([0, 1, 2, 5, 7, 8]) == ((0, 2), (5, 5), (7, 8))
    assert ranges(list(range(0, 2000, 2))) == tuple((part, part) for part in range(0, 1000, 2))


def test_grants_together_stay_within_their_room() -> None:
    grants = Grants(parts_max=10)
    assert grants.grant("a", list(range(6)), 0.0) == ((0, 5),)
    assert grants.grant("b", list(range(4)), 1.0) == ((0, 3),)
    assert grants.grant("c", list(range(6)), 2.0) == ()
    assert grants.grant("b", [2, 3], 3.0) == ((2, 3),)
    grants.close("a")
    assert grants.grant("c", list(range(20)), 4.0) == ((0, 7),)
    assert grants.grant("d", [0], 61.0 + 0.5) == ((0, 0),)  # b's deadline has passed


def test_a_device_is_granted_all_that_it_wants_or_half_of_the_room() -> None:
    """A smaller piece would wait as long for its deadline."""
    grants = Grants(parts_max=10)
    assert grants.grant("a", list(range(6)), 0.0) == ((0, 5),)
    assert grants.grant("b", list(range(6)), 1.0) == ()
    assert grants.grant("b", list(range(4)), 2.0) == ((0, 3),)
    grants.close("a")
    grants.close("b")
    assert grants.grant("b", list(range(5)), 3.0) == ((0, 4),)
    assert grants.grant("c", list(range(20)), 4.0) == ((0, 4),)


def test_who_offers_again_and_again_and_sends_nothing_keeps_nobody_out_for_ever() -> None:
    """It had all the room, and had it again before its deadline, while the others were told to come again."""
    grants = Grants(parts_max=10)
    served: dict[str, int] = {"honest": 0, "late": 0}
    for second in range(0, 600, 5):
        grants.grant("hostile", list(range(100)), float(second))
        for name in served:
            if grants.grant(name, list(range(4)), second + 1.0):
                grants.close(name)  # it sends them at once
                served[name] += 1
    assert min(served.values()) >= 4


@pytest.mark.parametrize("asked", [51, 70, 99, 100, 1000])
def test_who_asks_for_nearly_all_the_room_leaves_nobody_a_part_at_a_time(asked: int) -> None:
    """It asked for all but one part: the other got that one part a minute, and had been served with it."""
    grants = Grants(parts_max=100)
    wanted, again_at, updates = 60, 1.0, 0
    for second in range(3600):
        if second % 4 == 0:
            grants.grant("hostile", list(range(asked)), float(second))
        if second >= again_at:
            granted = grants.grant("honest", list(range(wanted)), second + 0.5)
            wanted -= sum(last - first + 1 for first, last in granted)
            again_at = second + (60 if granted else 5)  # it sends them, and has an answer or offers the rest
            if not wanted:
                grants.close("honest")
                wanted, updates = 60, updates + 1
    assert updates >= 3600 // (2 * 60) - 4


def test_who_was_refused_first_is_served_first_unless_it_stays_away() -> None:
    grants = Grants(parts_max=4)
    assert grants.grant("a", [0, 1, 2, 3], 0.0) == ((0, 3),)
    assert grants.grant("b", [0, 1, 2, 3], 1.0) == ()
    assert grants.grant("c", [0], 2.0) == ()
    assert grants.grant("a", [3, 4, 5, 6, 7], 3.0) == ((3, 6),)  # no more than before, and not for longer
    grants.close("a")
    assert grants.grant("c", [0], 7.0) == ()  # b is first
    assert grants.grant("a", [0], 7.0) == ()
    assert grants.grant("c", [0], 15.0) == ()
    assert grants.grant("c", [0], 16.0) == ((0, 0),)  # b has not come again


@pytest.mark.parametrize(("parts_max", "sweeps"), [(100, 1), (80, 1), (20, 4), (2, 40)])
def test_all_who_wait_are_served_at_once_if_there_is_room_in_whatever_order_they_come(
    parts_max: int, sweeps: int
) -> None:
    """One was served in each pause between two offers: after a minute without room the line never went away."""
    grants = Grants(parts_max)
    names = [f"pi-{number}" for number in range(40)]
    grants.grant("hostile", list(range(parts_max)), 0.0)
    assert [grants.grant(name, [0, 1], 1.0) for name in names] == [()] * 40
    grants.close("hostile")
    for sweep in range(sweeps):
        granted = [name for name in reversed(names) if grants.grant(name, [0, 1], 6.0 + 5 * sweep)]
        assert granted == names[: parts_max // 2][::-1]
        for name in granted:
            grants.close(name)
            names.remove(name)
    assert names == []


def test_what_is_kept_for_one_who_waits_goes_to_nobody_else() -> None:
    grants = Grants(parts_max=10)
    assert grants.grant("a", list(range(4)), 0.0) == ((0, 3),)
    assert grants.grant("b", list(range(4)), 0.0) == ((0, 3),)
    assert grants.grant("c", list(range(6)), 1.0) == ()
    grants.close("a")
    assert grants.grant("d", [0], 2.0) == ()
    assert grants.grant("b", list(range(8)), 3.0) == ((0, 3),)  # until its deadline of before
    grants.close("b")
    assert grants.grant("d", list(range(4)), 4.0) == ((0, 3),)
    assert grants.grant("e", [0], 5.0) == ()
    assert grants.grant("c", list(range(6)), 6.0) == ((0, 5),)


def test_who_has_sent_all_that_it_was_granted_goes_on_first_with_half_of_the_room() -> None:
    grants = Grants(parts_max=10)
    assert grants.grant("a", list(range(40)), 0.0) == ((0, 9),)
    assert grants.grant("b", list(range(40)), 50.0) == ()
    assert grants.grant("c", list(range(4)), 50.0) == ()
    assert grants.grant("a", list(range(10, 40)), 50.0, goes_on=True) == ((10, 19),)  # it may, until its deadline
    assert grants.grant("a", list(range(20, 40)), 60.5, goes_on=True) == ((20, 24),)
    assert grants.grant("b", list(range(40)), 61.0) == ((0, 4),)
    assert grants.grant("c", list(range(4)), 119.0) == ()
    assert grants.grant("a", list(range(25, 40)), 120.6) == ()  # it has not sent all
    assert grants.grant("c", list(range(4)), 121.0) == ((0, 3),)
    assert grants.grant("b", list(range(5, 40)), 121.1, goes_on=True) == ((5, 9),)


@pytest.mark.parametrize("with_hostile", [False, True])
def test_updates_that_need_several_grants_do_not_push_each_other_out_of_the_assembly(
    with_hostile: bool, make: Make
) -> None:
    """In the order of their offers all had begun, none was whole, and each part that came took another's place."""
    bench = make()
    updates, limits = bench.core._updates, bench.core.settings.limits
    bench.core._frames.settings = replace(bench.core.settings, limits=replace(limits, direct_parts=2))
    updates.validation.settings = replace(bench.core.settings, limits=replace(limits, assembly_bytes=1))
    devices = [bench.join(f"pi-{number}") for number in range(10)]
    sent = {pi.name: pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500) for pi in devices}
    parts = len(sent["pi-0"])
    assert parts == 3
    hostile = bench.join("hostile")
    begun = hostile.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)[: parts - 1]
    bench.receive(hostile.topic("offer"), hostile.offer(0, parts, seq=hostile.seq))
    bench.receive(hostile.topic("update"), *begun)
    updates._grants.parts_max = 1
    again_at = {pi.name: 0.0 for pi in devices}
    for _ in range(12 * 62 * parts // 10):
        bench.tick(10.0)
        if with_hostile:
            bench.receive(hostile.topic("update"), begun[0])  # so that it is never the longest silent
        for pi in (each for each in devices if again_at[each.name] <= bench.now):
            for grant in grants(bench.receive(pi.topic("offer"), pi.offer(0, parts, seq=pi.seq))):
                again_at[pi.name] = bench.now + 61
                wanted = [sent[pi.name][part] for first, last in grant.parts for part in range(first, last + 1)]
                if any(
                    receipt.outcome == "accepted" for receipt in receipts(bench.receive(pi.topic("update"), *wanted))
                ):
                    again_at[pi.name] = float("inf")
    assert [name for name, at in again_at.items() if at < float("inf")] == []


def test_an_offer_may_be_answered_at_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(3, 50)))
    assert (receipt.outcome, receipt.reason, receipt.seq) == ("invalid", "base-in-future", pi.seq)
    (again,) = receipts(bench.receive(pi.topic("offer"), pi.offer(3, 50, seq=pi.seq)))
    assert again == receipt
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(0, 0)))
    assert (receipt.outcome, receipt.reason.partition(":")[0]) == ("invalid", "bad-meta")
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(0, 65_535)))
    assert (receipt.outcome, receipt.reason) == ("invalid", "too-long")


def test_an_offer_that_there_is_no_room_for_is_told_to_come_again(make: Make) -> None:
    bench = make(limits__broker_queue_messages=100)
    first, second = bench.join("first"), bench.join("second")
    bench.core._updates._grants.parts_max = 3
    (grant,) = grants(bench.receive(first.topic("offer"), first.offer(0, 3)))
    assert grant.parts == ((0, 2),)
    (receipt,) = receipts(bench.receive(second.topic("offer"), second.offer(0, 3)))
    assert (receipt.outcome, receipt.retry_after_s > 0) == ("busy", True)
    bench.tick(60.0)
    (grant,) = grants(bench.receive(second.topic("offer"), second.offer(0, 3, seq=second.seq)))
    assert grant.parts == ((0, 2),)
