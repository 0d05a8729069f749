"""Updates of several parts, offered or sent at once, and the grants that ask for their parts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from support.small_world import (
    Bench,
    Device,
    float32_block,
    frames_of,
    published,
    receipts,
    refusals,
)
from ternbus.aggregator.core import events
from ternbus.aggregator.core.places import LARGEST_AT_ONCE, SILENCE_S, Places, life_s
from ternbus.broker.protocol.messages import Grant, Receipt

Make = Callable[..., Bench]


def grants(actions: list[events.Action]) -> list[Grant]:
    return [Grant.from_meta(frame.meta) for frame in frames_of(actions, "grant")]


def narrow(bench: Bench, *, direct_parts: int = 2, parts_max: int = 2000) -> Places:
    """As if the model were a large one: room for two of its updates at once."""
    updates, limits = bench.core._updates, bench.core.settings.limits
    bench.core._frames.settings = replace(bench.core.settings, limits=replace(limits, direct_parts=direct_parts))
    updates.places = Places(updates.validation.largest_bytes, 0, parts_max)
    return updates.places


def wide_update(bench: Bench, pi: Device) -> list[bytes]:
    parts = pi.update(float32_block(bench.schema, 1), 0, frame_bytes=1500)
    assert len(parts) == 3
    return parts


def test_parts_beyond_the_direct_ones_are_dropped_unless_they_were_granted(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    narrow(bench)
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


def offered(bench: Bench, pi: Device) -> list[bytes]:
    """The parts of an update that has been offered."""
    parts = wide_update(bench, pi)
    bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq))
    return parts


def test_an_offer_that_there_is_no_room_for_is_busy_and_its_turn_is_told(make: Make) -> None:
    bench = make()
    places = narrow(bench)
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    sent = [offered(bench, pi) for pi in devices]
    assert [receipt.outcome for receipt in receipts(bench.last)] == ["busy"]
    actions = bench.receive(devices[1].topic("update"), *sent[1])
    assert [receipt.outcome for receipt in receipts(actions)] == ["accepted"]
    assert [(grant.device, grant.seq, grant.parts) for grant in grants(actions)] == [("c", devices[2].seq, ((0, 2),))]
    bench.now += SILENCE_S  # neither a nor c sends anything
    actions = bench.receive(devices[3].topic("offer"), devices[3].offer(0, 3, seq=devices[3].seq))
    assert [grant.device for grant in grants(actions)] == ["d"]
    assert places.of("a") is places.of("c") is None
    assert receipts(bench.receive(devices[3].topic("update"), *sent[3]))[0].outcome == "accepted"


def test_the_rest_is_asked_for_as_soon_as_what_was_asked_for_is_here(make: Make) -> None:
    bench = make()
    narrow(bench, parts_max=2 * LARGEST_AT_ONCE)
    pi = bench.join("pi")
    parts = offered(bench, pi)
    assert [grant.parts for grant in grants(bench.last)] == [((0, 1),)]
    assert grants(bench.receive(pi.topic("update"), parts[1])) == []
    assert grants(bench.receive(pi.topic("update"), parts[1])) == []
    assert [grant.parts for grant in grants(bench.receive(pi.topic("update"), parts[0]))] == [((2, 2),)]
    assert receipts(bench.receive(pi.topic("update"), parts[2]))[0].outcome == "accepted"


def test_an_update_that_comes_unasked_and_has_no_room_is_busy_once_and_asked_for_in_its_turn(make: Make) -> None:
    bench = make()
    narrow(bench, direct_parts=8)
    devices = [bench.join(name) for name in ("a", "b", "c")]
    sent = [wide_update(bench, pi) for pi in devices]
    for pi, parts in zip(devices[:2], sent[:2], strict=True):
        assert published(bench.receive(pi.topic("update"), *parts[:2])) == []
    late = devices[2]
    assert [receipt.outcome for receipt in receipts(bench.receive(late.topic("update"), *sent[2]))] == ["busy"]
    actions = bench.receive(devices[0].topic("update"), sent[0][2])
    assert [receipt.outcome for receipt in receipts(actions)] == ["accepted"]
    assert [(grant.device, grant.parts) for grant in grants(actions)] == [("c", ((0, 2),))]
    assert receipts(bench.receive(late.topic("update"), *sent[2]))[0].outcome == "accepted"


def test_a_device_that_asks_in_its_turn_by_itself_is_not_told_of_it(make: Make) -> None:
    bench = make()
    narrow(bench, direct_parts=8)
    devices = [bench.join(name) for name in ("a", "b", "c")]
    for pi in devices:
        bench.receive(pi.topic("update"), wide_update(bench, pi)[0])
    bench.revoke("a")
    assert grants(bench.last) == []
    assert (
        published(
            bench.receive(
                devices[2].topic("update"),
                devices[2].update(float32_block(bench.schema, 1), 0, frame_bytes=1500, seq=devices[2].seq)[1],
            )
        )
        == []
    )


def test_parts_of_an_offered_update_that_waits_are_dropped(make: Make) -> None:
    bench = make()
    narrow(bench)
    for name in ("a", "b"):
        offered(bench, bench.join(name))
    pi = bench.join("c")
    parts = offered(bench, pi)
    assert published(bench.receive(pi.topic("update"), parts[0])) == []
    assert refusals(bench.tick(1.0)) == {"not-granted": 1}


def test_of_two_updates_of_a_device_the_newer_is_assembled(make: Make) -> None:
    """An older one, whose parts the broker delivers again, takes nothing from it."""
    bench = make()
    pi = bench.join("pi")
    old, new = wide_update(bench, pi), wide_update(bench, pi)
    bench.receive(pi.topic("update"), old[0], new[0], old[1], new[1], old[2], new[2])
    assert [(receipt.outcome, receipt.seq) for receipt in receipts(bench.last)] == [("accepted", pi.seq)]
    assert refusals(bench.tick(1.0)) == {"old-update": 2, "unfinished": 1}


def test_a_device_whose_counter_is_from_an_old_copy_of_its_disk_goes_on_when_the_newer_update_is_silent(
    make: Make,
) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.receive(pi.topic("update"), wide_update(bench, pi)[0])
    parts = pi.update(float32_block(bench.schema, 2), 0, frame_bytes=1500, seq=pi.seq - 1)
    assert published(bench.receive(pi.topic("update"), *parts)) == []
    bench.now += SILENCE_S
    assert receipts(bench.receive(pi.topic("update"), *parts))[0].outcome == "accepted"


def test_an_update_longer_than_its_codec_allows_is_invalid(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    about = {"base": 0, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": False, "metrics": {}}
    for size, outcomes in ((1100, ["invalid"]), (3000, [])):
        number = pi.next_seq()
        parts = [pi.frame("update", about, body=bytes(size), part=part, parts=3, seq=number) for part in range(2)]
        found = receipts(bench.receive(pi.topic("update"), *parts))
        assert [(receipt.outcome, receipt.reason) for receipt in found] == [(each, "too-long") for each in outcomes]
    assert refusals(bench.tick(1.0)) == {"too-long": 2, "unfinished": 1}


def test_a_restart_forgets_the_line_and_devices_ask_again(make: Make) -> None:
    bench = make()
    narrow(bench)
    devices = [bench.join(name) for name in ("a", "b", "c")]
    sent = [offered(bench, pi) for pi in devices]
    bench.receive(devices[0].topic("update"), *sent[0][:2])
    bench.restart()
    bench.start()
    narrow(bench)
    assert published(bench.receive(devices[0].topic("update"), sent[0][2])) == []
    for pi, parts in zip(devices, sent, strict=True):
        (grant,) = grants(bench.receive(pi.topic("offer"), pi.offer(0, 3, seq=pi.seq)))
        assert grant.parts == ((0, 2),)
        assert receipts(bench.receive(pi.topic("update"), *parts))[0].outcome == "accepted"


def test_while_the_disk_is_full_an_offer_is_busy_and_stands_in_no_line(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.handle(events.DiskChecked(free=0.01))
    (receipt,) = receipts(bench.receive(pi.topic("offer"), pi.offer(0, 3)))
    assert (receipt.outcome, receipt.retry_after_s > 0) == ("busy", True)
    assert bench.core._updates.places.of("pi") is None


def test_what_is_dropped_of_an_update_again_and_again_is_counted_at_once(make: Make) -> None:
    """A device that never ends an update for a day leaves no loop behind."""
    bench = make()
    pi = bench.join("pi")
    bench.receive(pi.topic("update"), wide_update(bench, pi)[0])
    place = bench.core._updates.places.of("pi")
    assert place is not None
    place.collector.dropped = 10**12
    assert receipts(bench.receive(pi.topic("update"), *wide_update(bench, pi)))[0].outcome == "accepted"
    assert refusals(bench.tick(1.0)) == {"unfinished": 10**12 + 1}


def test_a_device_that_lies_about_its_codec_holds_no_more_than_it_has_room_for(make: Make) -> None:
    bench = make()
    places = narrow(bench, direct_parts=8)
    size = places.largest_bytes
    about = {"base": 0, "samples": 1, "encoding": "raw", "sealed": False, "metrics": {}}
    for number in range(5):
        pi = bench.join(f"hostile-{number}")
        seq, large = pi.next_seq(), {**about, "codec": "float32"}
        small = {**about, "codec": "ternary"}
        parts = [pi.frame("update", large, body=bytes(1100), part=part, parts=4, seq=seq) for part in range(3)]
        lie = pi.frame("update", small, body=bytes(10), part=2, parts=4, seq=seq)
        assert size > 3 * 1100
        bench.receive(pi.topic("update"), *parts[: 2 if places.large.waits else 3], lie)
        check_memory(places)


def test_while_the_disk_is_full_an_update_of_several_parts_is_answered_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.handle(events.DiskChecked(free=0.01))
    found = receipts(bench.receive(pi.topic("update"), *wide_update(bench, pi)))
    assert [receipt.outcome for receipt in found] == ["busy"]


# --- whole federations in simulated time


@dataclass(slots=True)
class Sender:
    """A device that sends one update, or is hostile and never ends one."""

    device: Device
    frames: list[bytes]
    offers: bool
    gap_s: float  # between two parts
    left: list[int] = field(default_factory=list)  # parts that it is about to send
    offers_when_busy: bool = False  # as this project's devices do; others may send all of it again
    again_at: float = 0.0
    part_at: float = 0.0
    done_at: float | None = None

    def wants(self) -> float:
        """When it acts next."""
        if self.done_at is not None:
            return float("inf")
        return min(self.again_at, self.part_at) if self.left else self.again_at

    def act(self, now: float) -> tuple[str, bytes]:
        if self.left and self.part_at <= now:
            self.part_at = now + self.gap_s
            self.again_at = max(self.again_at, now + 60.0)
            return self.device.topic("update"), self.frames[self.left.pop(0)]
        self.again_at = now + 60.0
        if self.offers:
            return self.device.topic("offer"), self.device.offer(0, len(self.frames), seq=self.device.seq)
        self.left, self.part_at = list(range(1, len(self.frames))), now + self.gap_s
        return self.device.topic("update"), self.frames[0]

    def granted(self, grant: Grant, now: float) -> None:
        if grant.seq == self.device.seq:
            self.left = [part for first, last in grant.parts for part in range(first, last + 1)]
            self.part_at, self.again_at = now + min(1.0, self.gap_s), now + grant.deadline_s

    def answered(self, receipt: Receipt, now: float) -> None:
        if receipt.outcome == "busy":
            self.left, self.again_at = [], now + 1.25 * receipt.retry_after_s
            self.offers |= self.offers_when_busy
        elif receipt.outcome == "accepted":
            self.done_at = now


@dataclass(slots=True)
class Hostile(Sender):
    """``kind``: silent, renewing (offers ever new updates), drip (all parts but the last, slowly), or giant."""

    kind: str = "silent"
    bench: Bench | None = None

    def act(self, now: float) -> tuple[str, bytes]:
        if self.kind == "renewing":
            assert self.bench is not None
            self.frames = wide_update(self.bench, self.device)
        what = Sender.act(self, now)
        if self.kind in ("silent", "renewing", "giant"):
            self.left = []
        self.left = [part for part in self.left if part < len(self.frames) - 1]
        self.again_at = min(self.again_at, now + 20.0)
        if self.kind == "giant" and self.offers:
            return what[0], self.device.offer(0, self.bench.core.validation.parts_max, seq=self.device.seq)  # type: ignore[union-attr]
        return what

    def granted(self, grant: Grant, now: float) -> None:
        if self.kind == "drip":
            Sender.granted(self, grant, now)


def check_memory(places: Places) -> None:
    for room in (places.small, places.large):
        held = [place.collector.size_bytes for place in room.line.values()]
        assert all(place.has_room or not place.collector.size_bytes for place in room.line.values())
        assert sum(held) <= sum(place.size_bytes for place in room.line.values() if place.has_room) <= room.bytes_max


def play(bench: Bench, senders: list[Sender], until: float) -> None:
    """Let devices act at their times, and hand each what is for it."""
    names = {sender.device.name: sender for sender in senders}
    while (sender := min(senders, key=Sender.wants)).wants() < until:
        bench.now = max(bench.now, sender.wants())
        actions = bench.receive(*sender.act(bench.now))
        check_memory(bench.core._updates.places)
        for receipt in receipts(actions):
            names[receipt.device].answered(receipt, bench.now)
        for grant in grants(actions):
            names[grant.device].granted(grant, bench.now)
        if all(each.done_at is not None for each in senders if not isinstance(each, Hostile)):
            return


@pytest.mark.parametrize("offers", [True, False, None])
@pytest.mark.parametrize(
    "kinds", [[], ["silent"], ["renewing"] * 3, ["drip"] * 5, ["giant"] * 3, ["drip", "giant"] * 2]
)
def test_every_honest_device_is_whole_in_its_turn_whatever_hostile_ones_do(
    offers: bool | None, kinds: list[str], make: Make
) -> None:
    """They were there first; honest ones have lines so slow that a part takes most of a minute.

    ``offers``: whether honest devices offer their updates; None: after they were answered `busy`.
    """
    bench = make(merge__buffer_size=1000, merge__max_wait_s=1e7)
    narrow(bench, direct_parts=2 if offers else 8)
    honest, hostile = [bench.join(f"honest-{number}") for number in range(4)], []
    for number, kind in enumerate(kinds):
        device = bench.join(f"hostile-{number}")
        hostile.append(Hostile(device, wide_update(bench, device), bool(offers), 50.0, kind=kind, bench=bench))
    began = bench.now
    senders: list[Sender] = [
        Sender(
            pi,
            wide_update(bench, pi),
            bool(offers),
            50.0,
            offers_when_busy=offers is None,
            again_at=began + 1.0 + number,
        )
        for number, pi in enumerate(honest)
    ]
    before = len(senders) + len(hostile) - 1
    turns = before // LARGEST_AT_ONCE
    bound = (turns + 1) * (life_s(bench.core.validation.largest_bytes) + 40.0)
    play(bench, [*hostile, *senders], began + bound)
    assert all(sender.done_at is not None for sender in senders)
