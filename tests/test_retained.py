"""What the broker refuses or drops of the aggregator's retained messages is noticed, named, and published again."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest

from support.small_world import LAB, Bench, Device, follow, frames_of, refusals, saved, ternary_block
from ternbus.aggregator.core import events, records, retained
from ternbus.aggregator.core.retained import ACKNOWLEDGE_S, ASK_S, LOOK_S, READ_MAX, RETRY_MAX_S, RETRY_S
from ternbus.broker.backoff import CUT_SHORT
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity

HEAD, STATUS = topics.head(LAB), topics.status(LAB)
RECEIPT = topics.down(LAB, "pi", "receipt")
Make = Callable[..., Bench]


def small_parts(make: Make, **settings: object) -> Bench:
    """An aggregator whose snapshot of version 0 was just published, in three parts."""
    settings = {"limits__frame_bytes": 4096, **settings}
    bench = make(frame_bytes=1400, **settings)
    assert bench.core.awaited == {topic for topic in bench.retained if "/snapshot/" in topic}
    return bench


def parts_of(bench: Bench) -> list[str]:
    named = bench.head.snapshot
    return [topics.snapshot(LAB, named.place, part) for part in range(named.parts)]


def acknowledge(bench: Bench, *published: str) -> list[events.Action]:
    return [action for topic in published for action in bench.handle(events.Published(topic=topic))]


def show(bench: Bench, *asked: str) -> list[events.Action]:
    """The broker delivers what it retains under these topics."""
    return [action for topic in asked for action in bench.receive(topic, bench.retained[topic])]


def asked(actions: Iterable[events.Action]) -> list[str]:
    return [topic for each in actions if isinstance(each, events.Subscribe) for topic in each.filters]


def released(actions: Iterable[events.Action]) -> list[str]:
    return [topic for each in actions if isinstance(each, events.Unsubscribe) for topic in each.filters]


def lines(actions: Iterable[events.Action]) -> list[str]:
    return [each.text for each in actions if isinstance(each, events.Log)]


def again(actions: Iterable[events.Action]) -> list[str]:
    """What is published again, as it was."""
    return [topic for each in actions if isinstance(each, events.RepublishRetained) for topic in each.topics]


def rests(bench: Bench) -> bool:
    """Nothing is due before the next look at head and status."""
    return bench.core.deadline is not None and bench.core.deadline > bench.now + LOOK_S / 2


def wait(bench: Bench, seconds: float) -> list[events.Action]:
    """Time passes; the core is woken when it asks for it. The broker shows head and status where it has them."""
    end, done = bench.now + seconds, list[events.Action]()
    while (due := bench.core.deadline) is not None and due <= end:
        bench.now = max(bench.now, due)
        done += bench.handle(events.TimeReached())
        show(bench, *({HEAD, STATUS} & set(asked(bench.last))))
    bench.now = end
    return done


def test_a_snapshot_is_asked_for_by_name_once_the_broker_has_acknowledged_all_of_it(make: Make) -> None:
    bench = small_parts(make)
    parts = parts_of(bench)
    assert len(parts) > 2
    assert acknowledge(bench, HEAD, *parts[:-1], parts[0]) == []
    assert asked(acknowledge(bench, parts[-1])) == parts
    assert show(bench, *parts[1:]) == []
    assert show(bench, parts[1]) == []  # again
    done = show(bench, parts[0])
    assert released(done) == parts
    assert rests(bench)
    assert not bench.core.awaited


def test_of_what_others_write_where_a_part_is_asked_for_little_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the broker has no access list; the parts themselves come as fast as they are asked for."""
    bench = small_parts(make)
    parts, read = parts_of(bench), list[bytes]()

    def noting(payload: bytes) -> Frame:
        read.append(payload)
        return parse(payload)

    monkeypatch.setattr(retained, "parse", noting)
    acknowledge(bench, *parts)
    for payload in (b"flood", bench.retained[parts[1]]):  # of anything, or of another part
        bench.receive(parts[0], *[payload] * 1000)
    assert len(read) == READ_MAX
    assert asked(wait(bench, ASK_S)) == parts  # once more, and the flood is over
    assert released(show(bench, *parts)) == parts
    assert len(read) == READ_MAX + len(parts)


def test_each_version_s_delta_is_not_asked_for(make: Make) -> None:
    """One look for each snapshot, not for each version."""
    bench = make(merge__buffer_size=1, downlink__slots=6)
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    pi = bench.join("pi")
    found: list[str] = []
    for version in range(6):
        bench.send(pi, ternary_block(bench.schema, version), version)
        done = bench.last + acknowledge(bench, *sorted(bench.core.awaited))
        found += asked(done)
        show(bench, *asked(done))
    assert found == [topics.snapshot(LAB, 1, 0), topics.snapshot(LAB, 0, 0)]


def is_snapshot(action: events.Action) -> bool:
    return isinstance(action, events.Publish) and "/snapshot/" in action.topic


def test_a_snapshot_follows_once_the_broker_has_the_version_that_it_is_due_with(make: Make) -> None:
    """Devices train on that version meanwhile. After a snapshot no head is awaited until the next one is due."""
    bench = make(merge__buffer_size=1, downlink__slots=6)
    bench.acknowledges, pi = False, bench.join("pi")
    acknowledge(bench, *parts_of(bench))
    for version in range(3):
        assert HEAD not in bench.core.awaited
        assert not any(map(is_snapshot, acknowledge(bench, HEAD)))
        bench.send(pi, ternary_block(bench.schema, version), version)
        assert not any(map(is_snapshot, bench.last))
    assert HEAD in bench.core.awaited
    assert bench.head.snapshot.version == 0
    assert any(map(is_snapshot, acknowledge(bench, HEAD)))
    assert (bench.head.version, bench.head.snapshot.version) == (3, 3)
    assert HEAD not in bench.core.awaited
    assert not any(map(is_snapshot, acknowledge(bench, HEAD)))


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_where_the_broker_acknowledges_nothing_no_delta_is_lost_before_a_snapshot(make: Make, slots: int) -> None:
    """Also where the aggregator ends between a version and its snapshot."""
    bench = make(merge__buffer_size=1, downlink__slots=slots)
    bench.acknowledges, pi = False, bench.join("pi")
    for version in range(3 * slots + 1):
        bench.send(pi, ternary_block(bench.schema, version), version)
        assert bench.head.version - bench.head.snapshot.version < slots
        assert follow(bench.retained, bench.identity.public) == (version + 1, bench.head.digest)


@pytest.mark.parametrize("how", ["reconnects", "starts again"])
def test_a_snapshot_follows_where_the_acknowledgement_of_its_head_was_lost(make: Make, how: str) -> None:
    """The broker shows that it has the head, which is not published again; no other acknowledgement would come."""
    bench = make(merge__buffer_size=1, downlink__slots=6)
    bench.acknowledges, pi = False, bench.join("pi")
    for version in range(4):
        bench.send(pi, ternary_block(bench.schema, version), version)
    if how == "starts again":
        bench.restart()
    assert any(map(is_snapshot, bench.start() if how == "starts again" else bench.connect()))
    assert (bench.head.version, bench.head.snapshot.version) == (4, 4)
    assert HEAD not in bench.core.awaited


def test_a_head_that_is_refused_is_followed_by_no_snapshot(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__slots=6)
    bench.acknowledges, pi = False, bench.join("pi")
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    for version in range(3):
        bench.send(pi, ternary_block(bench.schema, version), version)
    for _ in range(2):
        assert not any(map(is_snapshot, bench.handle(events.Refused(topic=HEAD, reason="Quota exceeded"))))
        wait(bench, RETRY_MAX_S)
    assert any(map(is_snapshot, acknowledge(bench, HEAD)))


@pytest.mark.parametrize("held", [None, "another"])
def test_a_part_that_does_not_come_back_is_named_and_published_again(make: Make, held: str | None) -> None:
    """Neither when the broker holds nothing nor when it holds what was there before."""
    bench = small_parts(make)
    parts = parts_of(bench)
    kept = dict(bench.retained)
    acknowledge(bench, *parts)
    show(bench, *parts[:1], *parts[2:])
    if held is not None:
        frame = parse(kept[parts[1]])
        about = {
            "federation": LAB,
            "sender": "aggregator",
            "kind": "snapshot",
            "meta": frame.meta,
            "part": (1, frame.parts),
        }
        older = build(bench.identity, seq=frame.seq - 1, body=b"", **about)  # type: ignore[arg-type]
        forged = build(Identity.generate(), seq=frame.seq, body=b"", **about)  # type: ignore[arg-type]
        assert bench.receive(parts[1], older, forged, b"no", b"") == []
    assert asked(bench.tick(ASK_S)) == [parts[1]]  # once more: a broker under load delivers fewer
    bench.retained.clear()
    done = bench.tick(ASK_S)
    assert released(done) == parts
    (line,) = lines(done)
    assert f"does not hold 1 of the messages with which devices begin ({parts[1]}), though it acknowledged" in line
    assert "lower limits.frame_bytes in aggregator.toml (now 4096)" in line
    assert refusals(bench.tick(1.0)) == {"broker-dropped": 1}
    done = bench.tick(RETRY_S - 1.0)
    assert (again(done), lines(done)) == ([parts[1]], [])
    assert bench.retained == {parts[1]: kept[parts[1]]}
    assert asked(acknowledge(bench, parts[1])) == [parts[1]]
    done = show(bench, parts[1])
    assert lines(done) == ["the broker holds all retained messages again"]
    assert rests(bench)


def test_a_broker_that_keeps_dropping_is_asked_ever_more_rarely_and_named_once(make: Make) -> None:
    bench = small_parts(make)
    parts = parts_of(bench)
    done = acknowledge(bench, *parts)
    times: list[float] = []
    while len(times) < 12:
        found = wait(bench, 1.0)
        if again(found):
            times.append(bench.now)
            found += acknowledge(bench, *again(found))
        done += found
    gaps = [after - before - 2 * ASK_S for before, after in pairwise(times)]
    assert gaps[0] == pytest.approx(2 * RETRY_S, abs=2)
    assert gaps[-1] == pytest.approx(RETRY_MAX_S, abs=2)
    assert len(lines(done)) == 1


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("Packet too large", "lower limits.frame_bytes in aggregator.toml"),
        ("Quota exceeded", "raise the broker's quota"),
        ("Not authorized", "access list"),
        ("Retain not supported", "retain_available true"),
        ("Implementation specific error", "see the broker's log"),
    ],
)
def test_a_refused_part_is_named_with_what_to_change_and_published_again(make: Make, reason: str, advice: str) -> None:
    bench = small_parts(make)
    parts = parts_of(bench)
    acknowledge(bench, *parts[:-2])
    done = bench.handle(events.Refused(topic=parts[-2], reason=reason))
    (line,) = lines(done)
    assert f"the broker refused {parts[-2]}: {reason}; " in line
    assert advice in line
    done = bench.handle(events.Refused(topic=parts[-1], reason=reason))
    assert lines(done) == []
    assert asked(done) == parts[:-2]  # the others were acknowledged
    assert lines(show(bench, *parts[:-2])) == []
    assert refusals(wait(bench, 2.0)) == {"broker-refused": 2}
    assert again(wait(bench, RETRY_S)) == parts[-2:]
    assert asked(acknowledge(bench, *parts[-2:])) == parts[-2:]
    assert lines(show(bench, *parts[-2:])) == ["the broker holds all retained messages again"]


def test_a_refused_delta_head_or_status_is_published_again_and_a_receipt_is_not(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    delta = topics.delta(LAB, 1, 0)
    told = [
        line
        for topic in (delta, HEAD, STATUS, RECEIPT)
        for line in lines(bench.handle(events.Refused(topic=topic, reason="Quota exceeded")))
    ]
    assert len(told) == 4
    bench.retained.clear()
    done = wait(bench, RETRY_S)
    assert again(done) == [delta]
    assert set(bench.retained) == {delta, HEAD, STATUS}
    assert [frame.meta["state"] for frame in frames_of(done, "status")] == ["online"]
    assert lines(acknowledge(bench, delta, HEAD, STATUS)) == ["the broker holds all retained messages again"]
    assert lines(bench.handle(events.Refused(topic=HEAD, reason="Quota exceeded"))) != []


def withheld(bench: Bench) -> str:
    """As the status has it."""
    (record,) = saved(bench.handle(events.CountsRequested()), records.SituationTold)
    assert isinstance(record, records.SituationTold)
    return record.situation.withheld


def test_the_status_has_what_is_refused_until_the_broker_takes_it(make: Make) -> None:
    bench = make()
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    assert withheld(bench) == ""
    bench.handle(events.Refused(topic=RECEIPT, reason="Not authorized"))  # which nobody begins with
    assert withheld(bench) == ""
    bench.handle(events.Refused(topic=HEAD, reason="Not authorized"))
    assert withheld(bench).startswith(f"{HEAD} (Not authorized): allow this user the topics")
    bench.handle(events.Refused(topic=STATUS, reason="Not authorized"))
    assert withheld(bench).startswith(f"{HEAD} and 1 more (Not authorized): ")
    wait(bench, RETRY_S)
    acknowledge(bench, HEAD, STATUS)
    assert withheld(bench) == ""


def test_a_message_stays_named_while_it_is_published_again(make: Make) -> None:
    """A broker that acknowledges a snapshot and never has it: each look at the health says so."""
    bench = small_parts(make)
    acknowledge(bench, *parts_of(bench))
    wait(bench, ASK_S)
    wait(bench, ASK_S)
    for _ in range(100):
        assert "/snapshot/" in withheld(bench)
        acknowledge(bench, *sorted(bench.core.awaited))
        wait(bench, 10.0)


def test_a_newer_message_that_the_broker_takes_ends_what_it_refused_before(make: Make) -> None:
    """The pause before the next attempt may be ten minutes by then."""
    bench = make(merge__buffer_size=1, downlink__slots=100)
    bench.acknowledges, pi = False, bench.join("pi")
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    for _ in range(8):
        bench.handle(events.Refused(topic=HEAD, reason="Quota exceeded"))
        wait(bench, RETRY_MAX_S)
    bench.handle(events.Refused(topic=HEAD, reason="Quota exceeded"))
    show(bench, HEAD, STATUS)  # it asks what is there
    assert withheld(bench).startswith(HEAD)
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    assert lines(acknowledge(bench, HEAD)) == ["the broker holds all retained messages again"]
    assert withheld(bench) == ""


def test_a_head_that_the_broker_goes_on_to_refuse_is_not_told_as_one_that_it_lost(make: Make) -> None:
    """It holds an older one meanwhile, and the pause before the next attempt is longer than that between two looks."""
    bench = make(merge__buffer_size=1, downlink__slots=100)
    bench.acknowledges, pi = False, bench.join("pi")
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    older = bench.retained[HEAD]
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    found: list[events.Action] = []
    end = bench.now + 20 * LOOK_S
    while bench.now < end:
        if HEAD in bench.core.awaited or not found:
            found += bench.handle(events.Refused(topic=HEAD, reason="Quota exceeded"))
        bench.now = bench.core.deadline or end
        found += bench.handle(events.TimeReached())
        wanted = asked(bench.last)
        found += show(bench, *(topic for topic in wanted if topic != HEAD))
        if HEAD in wanted:
            bench.receive(HEAD, older)
    assert "Quota exceeded" in withheld(bench)
    assert [line for line in lines(found) if "acknowledged" in line] == []


def test_what_the_broker_refuses_beside_is_told_once_and_a_look_does_not_take_it_back(make: Make) -> None:
    """As a view that its access list forbids: the look asks for other messages."""
    bench = make()
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    topic = topics.down(LAB, "pi", "receipt")
    told: list[str] = []
    for _ in range(5):
        told += lines(bench.handle(events.Refused(topic=topic, reason="Not authorized")))
        told += lines(wait(bench, 2 * LOOK_S))
    assert len(told) == 1
    assert f"the broker refused {topic}: Not authorized" in told[0]


def test_a_status_that_was_refused_is_forgotten_with_its_connection(make: Make) -> None:
    """The next one begins with a new status, also at a broker that has lost everything."""
    bench = make()
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    bench.handle(events.Refused(topic=STATUS, reason="Quota exceeded"))
    assert withheld(bench).startswith(STATUS)
    bench.retained.clear()
    bench.connect()
    wait(bench, 10.0)
    assert STATUS in bench.retained
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    assert withheld(bench) == ""


def test_what_is_no_longer_to_be_retained_is_no_longer_missed(make: Make) -> None:
    """Such as a part of terms, of which newer ones have fewer: nothing is published again, and nothing stays named."""
    bench = make()
    bench.join("pi")
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    bench.revoke("pi")
    (page,) = [topic for topic in bench.retained if "/revocations/" in topic]
    bench.handle(events.Refused(topic=page, reason="Quota exceeded"))
    bench.core.published.sizes.pop(page)
    assert lines(wait(bench, RETRY_S)) == ["the broker holds all retained messages again"]
    assert withheld(bench) == ""


def test_a_list_of_revocations_that_was_refused_is_given_again_behind_a_snapshot(make: Make) -> None:
    """A newer snapshot takes the place of an older one, and not of the list."""
    bench = make(merge__buffer_size=1, downlink__slots=1)
    pi, _ = bench.join("pi"), bench.join("other")
    acknowledge(bench, *parts_of(bench))
    show(bench, *parts_of(bench))
    bench.revoke("other")
    (page,) = [topic for topic in bench.retained if "/revocations/" in topic]
    bench.retained.pop(page)
    bench.handle(events.Refused(topic=page, reason="Quota exceeded"))
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    assert bench.head.snapshot.version == 1
    assert withheld(bench).startswith(page)
    acknowledge(bench, *sorted(bench.core.awaited - {page}))
    show(bench, *parts_of(bench))
    wait(bench, RETRY_S)
    assert page in bench.retained
    acknowledge(bench, page)
    assert withheld(bench) == ""


def test_a_broker_that_acknowledges_nothing_is_named_once(make: Make) -> None:
    """Such as nats-server whose disk is full."""
    bench = small_parts(make)
    parts = parts_of(bench)
    wait(bench, ACKNOWLEDGE_S - 1)
    acknowledge(bench, parts[0])
    assert lines(wait(bench, ACKNOWLEDGE_S - 1)) == []
    (line,) = lines(wait(bench, 10 * ACKNOWLEDGE_S))
    assert f"the broker has acknowledged nothing for 120 s; it owes {len(parts) - 1}, as {parts[1]}" in line
    assert "free disk space on the broker's machine" in line
    acknowledge(bench, *parts[1:])
    assert lines(show(bench, *parts)) == ["the broker holds all retained messages again"]


def test_what_a_newer_snapshot_replaces_is_not_published_again(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__slots=2)
    (part,) = parts_of(bench)
    acknowledge(bench, part)
    assert asked(bench.last) == [part]
    pi = bench.join("pi")
    bench.handle(events.Refused(topic=STATUS, reason="Quota exceeded"))
    bench.handle(events.Refused(topic=HEAD, reason="Quota exceeded"))
    bench.send(pi, ternary_block(bench.schema, 0), 0)  # with a snapshot to the other place
    done = bench.last
    assert released(done) == [part]
    newest = topics.snapshot(LAB, 1, 0)
    assert bench.core.awaited == {newest, STATUS}
    assert asked(acknowledge(bench, newest)) == [newest]
    show(bench, newest)
    done = wait(bench, RETRY_S)
    assert again(done) == []
    assert [parse(each.payload).kind for each in done if isinstance(each, events.Publish)] == ["status"]


def test_a_snapshot_of_many_parts_is_asked_for_some_at_a_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the aggregator at the broker stays small."""
    monkeypatch.setattr(retained, "ASKED_AT_ONCE", 2)
    bench = small_parts(make)
    parts = parts_of(bench)
    assert asked(acknowledge(bench, *parts)) == parts[:2]
    done = show(bench, *parts[:2])
    assert (released(done), asked(done)) == (parts[:2], parts[2:4])
    assert bench.receive(parts[2], bench.retained[parts[2]] + b"more") == []
    done = wait(bench, 2 * ASK_S)
    assert lines(done) == lines(done)[:1]  # one line, whatever is lost
    assert again(wait(bench, RETRY_S)) == parts[2:]


def test_a_connection_that_ends_meanwhile_is_followed_by_another_look(make: Make) -> None:
    bench = small_parts(make, merge__buffer_size=1)
    parts = parts_of(bench)
    acknowledge(bench, parts[0])
    bench.dial()
    bench.handle(events.Connected(frame_bytes=1400))
    assert asked(bench.receive(HEAD, bench.retained[HEAD])) == parts
    show(bench, *parts)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 0), 0)
    delta = topics.delta(LAB, 1, 0)
    bench.handle(events.Refused(topic=delta, reason="Quota exceeded"))
    bench.dial()
    assert bench.core._retained.due is None
    bench.handle(events.Connected(frame_bytes=1400))
    assert asked(bench.receive(HEAD, bench.retained[HEAD])) == []  # the snapshot was seen, and the delta is lost
    assert again(wait(bench, RETRY_S)) == [delta]


def test_connections_that_end_while_a_snapshot_is_on_its_way_point_to_the_broker_s_limit(make: Make) -> None:
    bench = small_parts(make)
    for _ in range(CUT_SHORT - 1):
        bench.dial()
        bench.handle(events.Connected(frame_bytes=1400))
        wait(bench, 5.0)  # the broker does not show the head, and is given everything again
        assert set(parts_of(bench)) == bench.core.awaited
    (line,) = lines(bench.handle(events.Disconnected()))
    assert "another client" in line
    assert "too large a message? Then lower limits.frame_bytes in aggregator.toml" in line


def test_a_new_process_looks_once_whether_the_broker_holds_the_snapshot(make: Make) -> None:
    bench = make()
    (part,) = parts_of(bench)
    acknowledge(bench, part)
    show(bench, part)
    bench.restart()
    assert asked(bench.start())[-1:] == [part]
    show(bench, part)
    bench.connect()
    assert part not in asked(bench.last)
    assert follow(bench.retained, bench.identity.public) == (0, bench.core.model.digest)


def test_a_new_process_looks_for_the_deltas_too_and_gives_the_broker_those_that_it_refused(make: Make) -> None:
    """The process that knew of the refusal ended before its next attempt. Nobody else could make a version follow."""
    bench = make(merge__buffer_size=1, downlink__slots=8)
    pi = bench.join("pi")
    for version in range(2):
        bench.send(pi, ternary_block(bench.schema, version), version)
    older, gone = topics.delta(LAB, 1, 0), topics.delta(LAB, 2, 0)
    bench.retained.pop(gone)
    bench.handle(events.Refused(topic=gone, reason="Quota exceeded"))
    bench.restart()
    assert asked(bench.start())[-3:] == [*parts_of(bench), older, gone]
    show(bench, *parts_of(bench), older)
    wait(bench, ASK_S)
    (line,) = lines(wait(bench, ASK_S))
    assert f"does not hold 1 of the messages with which devices begin ({gone})" in line
    assert again(wait(bench, RETRY_S)) == [gone]
    assert follow(bench.retained, bench.identity.public) == (2, bench.head.digest)
    bench.retained.pop(gone)  # the broker acknowledges it and has it not, as before
    assert lines(acknowledge(bench, gone)) == []
    assert asked(bench.last) == [gone]
    wait(bench, ASK_S)
    wait(bench, ASK_S)
    assert withheld(bench).startswith(gone)
    assert again(wait(bench, 2 * RETRY_S)) == [gone]
    acknowledge(bench, gone)
    assert lines(show(bench, gone)) == ["the broker holds all retained messages again"]


def test_a_snapshot_that_nobody_asked_for_is_unsubscribed_from(make: Make) -> None:
    """The persistent session keeps what an earlier process subscribed to."""
    bench = make()
    (part,) = parts_of(bench)
    assert released(bench.receive(part, bench.retained[part])) == [part]
    assert bench.receive(part, b"") == []


def test_a_device_that_is_not_there_is_no_reason_to_log_every_refused_receipt(make: Make) -> None:
    bench = make()
    pi = Device("pi", bench.schema)
    topic = topics.down(LAB, pi.name, "receipt")
    done = [action for _ in range(100) for action in bench.handle(events.Refused(topic=topic, reason="Quota exceeded"))]
    assert len(lines(done)) == 1
