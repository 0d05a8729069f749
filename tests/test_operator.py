"""What the operator asks for: pause, resume, close, counts, stop."""

from collections.abc import Callable

from support.small_world import (
    LAB,
    Bench,
    place,
    refusals,
    saved,
    ternary_block,
)
from ternbus.aggregator.core import events, records
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.messages import Status

STATUS = topics.status(LAB)
Make = Callable[..., Bench]


def test_pausing_and_resuming_are_said_in_the_head(make: Make) -> None:
    bench = make()
    actions = bench.handle(events.StateRequested(state="paused", request=7))
    order = [
        place(actions, records.StateChanged),
        place(actions, records.FramesRetained),
        place(actions, events.Publish),
    ]
    assert order == sorted(order)
    assert saved(actions, records.RequestDone) == [records.RequestDone(request=7)]
    assert bench.head.state == "paused"
    again = bench.handle(events.StateRequested(state="paused"))
    assert again == []
    # what a device sent before it heard of it is still accepted
    assert bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"
    bench.handle(events.StateRequested(state="open"))
    assert bench.head.state == "open"


def test_closing_merges_what_is_accepted_and_takes_no_more(make: Make) -> None:
    bench = make()
    pi, late = bench.join("pi"), bench.join("late")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.handle(events.StateRequested(state="closed"))
    assert (bench.version, bench.head.state) == (1, "closed")
    (receipt,) = bench.send(late, ternary_block(bench.schema, 2), 1)
    assert (receipt.outcome, receipt.reason) == ("invalid", "closed")
    bench.restart()
    bench.start()
    (receipt,) = bench.send(late, ternary_block(bench.schema, 2), 1)
    assert (receipt.outcome, receipt.reason) == ("invalid", "closed")
    actions = bench.handle(events.StateRequested(state="paused", request=8))
    (done,) = saved(actions, records.RequestDone)
    assert "`ternbus aggregator resume` opens the federation" in done.error
    assert bench.head.state == "closed"
    bench.handle(events.StateRequested(state="open"))
    assert bench.head.state == "open"  # by which devices that waited go on
    assert bench.send(late, ternary_block(bench.schema, 2), 1)[0].outcome == "accepted"


def test_counts_asked_for_are_saved_before_the_request_is_done(make: Make) -> None:
    bench = make()
    bench.receive("nonsense", b"")
    actions = bench.handle(events.CountsRequested(request=3))
    assert place(actions, records.Observed) < place(actions, records.RequestDone)
    assert refusals(actions) == {"unknown-topic": 1}


def test_stopping_finishes_what_is_accepted_and_says_goodbye(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    actions = bench.handle(events.StopRequested())
    assert bench.version == 1
    assert Status.from_meta(parse(bench.retained[STATUS]).meta).state == "offline"
    assert isinstance(actions[-1], events.Stop)
    # what still comes in is not an answer, and not lost: the device sends it again
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 2), 1)
    assert receipt.outcome == "busy"
    assert receipt.retry_after_s > 0
    assert bench.receive(STATUS, bench.retained[STATUS]) == []
    counted = saved(bench.tick(1.0), records.Observed)[0]
    assert counted.outcomes == {"busy": 1}
    bench.handle(events.Connected(frame_bytes=100_000))
    assert Status.from_meta(parse(bench.retained[STATUS]).meta).state == "offline"
    bench.restart()
    bench.start()
    assert bench.send(pi, ternary_block(bench.schema, 2), 1, seq=pi.seq)[0].outcome == "accepted"


def test_stopping_with_nothing_accepted_merges_nothing(make: Make) -> None:
    bench = make()
    bench.handle(events.StopRequested())
    assert bench.version == 0
