"""The device's event loop: what it handles at once, when it saves, and what it acknowledges; with a scripted core."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ternbus.broker.link.events import Arrived, LinkEvent, Published, Token
from ternbus.broker.link.link import Link
from ternbus.broker.protocol.identity import KeyId
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Publish, Save, Stop
from ternbus.edge.core.core import Core
from ternbus.edge.core.state import AnsweredUpdate, State
from ternbus.edge.shell import service as module
from ternbus.edge.shell.service import Service
from ternbus.edge.store.outbox import Outbox

KEY = KeyId(bytes(8))
STOP = Stop(code=0, reason="the test is over")
TOPIC = "ternbus/1/demo/all/head"


def state(head_seq: int) -> State:
    return State(key=KEY, head_seq=head_seq)


def answer(seq: int) -> AnsweredUpdate:
    return AnsweredUpdate(seq=seq, base=seq, outcome="accepted", version=seq, key=KEY, digest=b"")


class ScriptedCore:
    """Its actions are a script, one list for each time that it proceeds; it stops with the last one."""

    def __init__(self, script: Sequence[Sequence[Action]], stops_after: int = 1000) -> None:
        self.state, self.stopped = state(0), False
        self.rounds: list[list[events.Event]] = []
        self._script, self._stops_after = list(script), stops_after
        self._taken: list[events.Event] = []

    def take(self, event: events.Event, now: float) -> None:
        assert not self.stopped
        self._taken.append(event)
        self._stops_after -= 1
        self.stopped = self._stops_after == 0

    def proceed(self, now: float) -> list[Action]:
        self.rounds.append(self._taken)
        self._taken = []
        actions = list(self._script.pop(0))
        for each in actions:
            self.state = each.state if isinstance(each, Save) else self.state
        return actions

    def handle(self, event: events.Event, now: float) -> list[Action]:
        self.take(event, now)
        return self.proceed(now)

    def due_s(self) -> None:
        return None


class Recorder:
    """A link and an outbox that do nothing but remember."""

    counters: Mapping[str, int] = {}

    def __init__(self) -> None:
        self.acknowledged: list[list[int]] = []
        self.saved: list[tuple[int, list[int], bool]] = []
        self.saves_then: Callable[[], object] = lambda: None

    def acknowledge(self, tokens: Iterable[Token]) -> None:
        self.acknowledged.append([token.mid for token in tokens])

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> int:
        return 77

    def disconnect(self, flush_s: float) -> None:
        pass

    def save(self, saved: State, answered: AnsweredUpdate | None, counters: object, *, durable: bool = True) -> None:
        self.saved.append((saved.head_seq, [] if answered is None else [answered.seq], durable))
        then, self.saves_then = self.saves_then, lambda: None
        then()


def run(
    script: Sequence[Sequence[Action]],
    before: Sequence[LinkEvent | events.Event],
    reaches: Sequence[events.StopRequested] = (),
    **more: int,
) -> tuple[ScriptedCore, Recorder]:
    """Run a service on what has happened before it runs; it is asked to stop when it has saved for the first time."""
    core, recorder = ScriptedCore([[], *script], **more), Recorder()

    def ask() -> None:
        for each in reaches:
            service.request_stop(each.reason)

    recorder.saves_then = ask
    delivers: list[Callable[[LinkEvent], None]] = []

    def make_link(deliver: Callable[[LinkEvent], None]) -> Link:
        delivers.append(deliver)
        return cast("Link", recorder)

    service = Service(
        cast("Core", core), outbox=cast("Outbox", recorder), make_link=make_link, report=cast("Any", print)
    )
    for each in before:
        if isinstance(each, events.StopRequested):
            service.request_stop(each.reason)
        else:
            delivers[0](cast("LinkEvent", each))
    assert service.run() == STOP
    return core, recorder


def message(mid: int, payload: bytes = b"no frame") -> Arrived:
    return Arrived(
        topic=TOPIC, payload=payload, retained=False, token=Token(connection=1, mid=mid, size_bytes=8), qos=1
    )


def test_messages_that_wait_are_handled_and_acknowledged_together() -> None:
    core, recorder = run([[STOP]], [message(1), message(2, b""), message(3)])
    assert [len(each) for each in core.rounds] == [1, 2]  # its start; an empty message is no event
    assert recorder.acknowledged == [[1, 2, 3]]


def test_what_happens_between_messages_is_handled_in_its_place() -> None:
    before: list[LinkEvent | events.Event] = [
        message(1),
        events.StopRequested(reason="a"),
        message(2),
        message(3),
        events.StopRequested(reason="b"),
    ]
    core, recorder = run([[], [], [], [STOP]], before)
    kinds = [[type(event).__name__ for event in each] for each in core.rounds[1:]]
    assert kinds == [["FrameMalformed"], ["StopRequested"], ["FrameMalformed"] * 2, ["StopRequested"]]
    assert recorder.acknowledged == [[1], [2, 3]]


def test_no_more_than_some_messages_are_handled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    _, recorder = run([[], [STOP]], [message(mid) for mid in range(1, 5)])
    assert recorder.acknowledged == [[1, 2], [3, 4]]


def test_what_comes_after_the_message_that_ends_it_is_not_acknowledged() -> None:
    _, recorder = run([[STOP]], [message(1), message(2), message(3)], stops_after=3)
    assert recorder.acknowledged == [[1, 2]]


def test_what_a_peer_tells_again_is_saved_with_the_next_durable_save() -> None:
    script: list[list[Action]] = [
        [Save(state=state(1), durable=False)],
        [Save(state=state(2), durable=False)],
        [Save(state=state(3), durable=True), STOP],
    ]
    stops = [events.StopRequested(reason="") for _ in script]
    _, recorder = run(script, stops)
    assert recorder.saved == [(3, [], True), (3, [], True)]


def test_a_receipt_is_saved_before_it_is_acknowledged() -> None:
    script: list[list[Action]] = [
        [Save(state=state(1), durable=False)],
        [Save(state=state(2), answered=answer(5), durable=False)],
        [STOP],
    ]
    _, recorder = run(
        script, [message(1), events.StopRequested(reason=""), message(2), events.StopRequested(reason="")]
    )
    assert recorder.saved == [(2, [5], False), (2, [], True)]


def test_what_a_peer_tells_again_is_saved_by_itself_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_WITHIN_S", 0.01)
    script: list[list[Action]] = [
        [Save(state=state(1), durable=False)],
        [],  # it wakes up for the save, not for an event
        [Save(state=state(2), durable=True), STOP],
    ]
    core, recorder = run(script, [message(1)], reaches=[events.StopRequested(reason="")])
    assert recorder.saved == [(1, [], False), (2, [], True), (2, [], True)]
    assert [type(event).__name__ for event in core.rounds[2]] == ["TimeReached"]


def test_nothing_that_was_put_off_is_lost_by_a_stop() -> None:
    script: list[list[Action]] = [[Save(state=state(1), durable=False), STOP]]
    _, recorder = run(script, [message(1)])
    assert recorder.saved == [(1, [], False), (1, [], True)]  # before it waits for the broker, and at its end


def test_acknowledgements_of_the_broker_are_handled_with_what_happens_next() -> None:
    sent = Publish(topic=TOPIC, payload=b"update", seq=9)
    core, _ = run([[sent], [STOP]], [message(1), events.StopRequested(reason=""), Published(ticket=77)])
    assert [type(event).__name__ for event in core.rounds[1]] == [
        "Published",
        "FrameMalformed",
    ]  # of none that is known


def test_acknowledgements_of_the_broker_are_handled_where_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACKNOWLEDGED_WITHIN_S", 0.0)
    sent = Publish(topic=TOPIC, payload=b"update", seq=9)

    class Acknowledging(Recorder):
        def publish(self, topic: str, payload: bytes, *, retain: bool) -> int:
            delivers[0](Published(ticket=77))
            return 77

    core, recorder = ScriptedCore([[sent], [STOP]]), Acknowledging()
    delivers: list[Callable[[LinkEvent], None]] = []

    def make_link(deliver: Callable[[LinkEvent], None]) -> Link:
        delivers.append(deliver)
        return cast("Link", recorder)

    outbox = cast("Outbox", recorder)
    assert Service(cast("Core", core), outbox=outbox, make_link=make_link, report=cast("Any", print)).run() == STOP
    published, reached = core.rounds[1]
    assert published == events.Published(seq=9)
    assert isinstance(reached, events.TimeReached)


def test_a_broker_that_acknowledges_nothing_wakes_a_device_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACKNOWLEDGED_WITHIN_S", 0.001)
    monkeypatch.setattr(module, "ACKNOWLEDGED_WITHIN_MAX_S", 0.004)
    sent, waits = Publish(topic=TOPIC, payload=b"update", seq=9), []
    core = ScriptedCore([[sent], [], [], [], [sent], [], [STOP]])
    service = Service(
        cast("Core", core),
        outbox=cast("Outbox", Recorder()),
        make_link=lambda _: cast("Link", Recorder()),
        report=cast("Any", print),
    )

    class Queue(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            waits.append(timeout)
            raise Empty

    monkeypatch.setattr(service, "_queue", Queue())
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    assert service.run() == STOP
    assert waits == pytest.approx([0.001, 0.002, 0.004, 0.004, 0.001, 0.002])


def test_messages_are_held_only_while_the_service_waits_for_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is about to take in may change what it needs, also where the queue is empty by then (Python 3.13)."""
    held: list[tuple[str, float]] = []

    class Held(Recorder):
        holds_s: Callable[[str], float]

    class Asking(ScriptedCore):
        follower = SimpleNamespace(can_wait_s=lambda _, is_occupied: 3.0 if is_occupied else 0.0)
        training = SimpleNamespace(is_occupied=lambda _: True)

        def take(self, event: events.Event, now: float) -> None:
            held.append((type(event).__name__, recorder.holds_s(TOPIC)))
            super().take(event, now)

    core, recorder, due = Asking([[], [], [STOP]]), Held(), iter([True, False])
    service = Service(
        cast("Core", core),
        outbox=cast("Outbox", recorder),
        make_link=lambda _: cast("Link", recorder),
        report=cast("Any", print),
    )

    class Queue(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            held.append(("idle", recorder.holds_s(TOPIC)))
            if next(due):
                raise Empty
            service.request_stop("")
            found = super().get()
            held.append(("about to wake up", recorder.holds_s(TOPIC)))
            return found

    monkeypatch.setattr(service, "_queue", Queue())
    assert service.run() == STOP
    assert held == [
        ("Started", 0.0),
        ("idle", 3.0),
        ("TimeReached", 0.0),
        ("idle", 3.0),
        ("about to wake up", 0.0),
        ("StopRequested", 0.0),
    ]
