"""Who holds back an enrollment has the aggregator sign `unknown` for its key; replayed later, it ends no device."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    Device,
    aggregator,
    following,
    logged,
    of,
    profile,
    published,
    sending,
)
from support.edge_processes import Server, edge, joined, reap, serving
from support.scripted_aggregator import FEDERATION
from support.small_world import LAB, SHAPES, Bench, frames_of, make_directory, receipts, scratch
from support.small_world import Device as Forger
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Receipt
from ternbus.broker.server import running
from ternbus.edge.core import events
from ternbus.edge.core.actions import Publish, Stop
from ternbus.edge.core.core import Core
from ternbus.edge.core.state import State
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.store import outbox

Message = tuple[str, bytes]
RECEIPTS = topics.down(LAB, DEVICE, Receipt.KIND)


class Wire:
    """A real aggregator's core and a real device's, with a broker between them that hands over what it likes."""

    def __init__(self) -> None:
        self.bench = Bench(make_directory(scratch() / "home"))
        self.bench.start()
        tensors = {name: tuple(shape) for name, shape in SHAPES.items()}
        own = profile(
            "train",
            federation=LAB,
            aggregator_public=self.bench.identity.public,
            tensors=tensors,
            code=self.bench.invite(DEVICE),
        )
        self.device = Device(Core(own, State(key=own.key)))
        self.device.handle(events.Started())
        self.device.connect()

    def down(self) -> list[Message]:
        """All that the aggregator has published, in order."""
        return [(action.topic, action.payload) for action in self.bench.published if action.payload]

    def up(self, actions: list[Any], kind: str) -> None:
        """Hand what the device publishes of a kind to the aggregator."""
        for action in actions:
            if isinstance(action, Publish) and action.topic == topics.up(LAB, DEVICE, kind):
                self.bench.receive(action.topic, action.payload)

    def forged(self, seq: int) -> Message:
        """The aggregator's answer to a frame that a stranger made up: the device's name and key id, and a number."""
        stranger = Forger(DEVICE, self.bench.schema, Identity(b"s" * 32))
        frame = stranger.frame("metrics", {}, seq=seq).replace(stranger.identity.key_id, DEVICE_KEY.key_id)
        self.bench.tick(1.0)
        (answer,) = frames_of(self.bench.receive(stranger.topic("metrics"), frame), "receipt")
        assert Receipt.from_meta(answer.meta).outcome == "unknown"
        return self.down()[-1]

    def enrolled(self) -> list[Any]:
        """The device enrolls; returns what it does then."""
        done = self.device.arrive(*[message for message in self.down() if message[0] == topics.status(LAB)])
        self.up(done, "enroll")
        assert receipts(self.bench.last)[-1].outcome == "enrolled"
        return self.device.arrive(self.down()[-1])


def test_unknown_that_was_signed_before_the_enrollment_ends_no_device_after_it() -> None:
    wire = Wire()
    kept = [wire.forged(seq) for seq in range(1, 9)]
    done = wire.enrolled()
    used = [frame.seq for frame in published(done, "status")]
    assert set(used) <= set(range(1, 9))  # so that one of the receipts is for a number that the device has used
    assert of(wire.device.arrive(*kept), Stop) == []
    assert wire.device.core.dropped["old-receipt"] == len(used)
    again = wire.device.restarted()
    again.connect()
    assert of(again.arrive(*kept), Stop) == []
    assert "cloned" not in logged(wire.device.actions)


def test_who_has_unknown_signed_for_any_number_makes_no_device_believe_in_another_machine() -> None:
    wire = Wire()
    kept = [wire.forged(seq) for seq in (1000, 2000, 3000, 4000, 5000)]
    wire.enrolled()
    wire.device.arrive(*kept)
    assert "cloned" not in logged(wire.device.actions)


def test_each_receipt_that_knows_the_key_makes_all_unknown_before_it_void() -> None:
    """Such as those of an aggregator that was restored twice, first from before the device joined."""
    scripted, device, frame = sending()
    key = DEVICE_KEY.key_id
    seq = published(device.actions, "status")[-1].seq
    unknown = scripted.receipt(DEVICE, key, seq, "unknown")
    device.arrive(scripted.receipt(DEVICE, key, frame.seq, "accepted"))
    assert of(device.arrive(unknown), Stop) == []
    assert device.core.dropped["old-receipt"] == 1
    (stop,) = of(device.arrive(scripted.receipt(DEVICE, key, seq, "unknown")), Stop)
    assert stop.code == 3


def test_a_new_key_has_no_receipt_yet_and_believes_no_unknown_before_it_has() -> None:
    """The number of an outstanding update is known to the broker, and the key from the enrollment that it holds."""
    scripted, device, _ = sending()
    device.core.pending.put(device.core.state.with_receipt(7))
    fresh = Identity(b"n" * 32)
    again = device.restarted(identity=fresh, code="second")
    again.connect()
    assert again.core.state.receipt_seq == 0
    update = again.core.state.outstanding
    assert update is not None
    assert of(again.arrive(scripted.receipt(DEVICE, fresh.key_id, update.seq, "unknown")), Stop) == []
    assert again.core.dropped["odd-receipt"] == 1
    again.arrive(scripted.receipt(DEVICE, fresh.key_id, 1, "enrolled"))
    assert again.core.state.receipt_seq


def test_refused_is_no_answer_to_an_update() -> None:
    scripted, device, frame = sending()
    assert of(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "refused")), Stop) == []
    assert device.core.dropped["odd-receipt"] == 1


def test_the_number_of_the_newest_receipt_is_on_disk_and_an_outbox_of_before_has_none(tmp_path: Path) -> None:
    key = DEVICE_KEY.key_id
    with outbox.Outbox(tmp_path, key) as kept:
        kept.save(State(key=key, enrolled=True), None, {})
        kept._db.execute("DELETE FROM kept WHERE name = 'receipt_seq'")  # as an earlier version leaves it
    with outbox.Outbox(tmp_path, key) as kept:
        assert kept.state.receipt_seq == 0
        kept.save(replace(kept.state, receipt_seq=2**62), None, {})
    assert outbox.summary(tmp_path).state.receipt_seq == 2**62


def test_a_device_of_before_compares_unknown_with_the_newest_head() -> None:
    """It has no number of a receipt."""
    scripted = aggregator()
    unknown = [scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "unknown") for seq in range(1, 20)]
    scripted, device = following(scripted=scripted)
    assert device.core.state.receipt_seq == 0
    assert of(device.arrive(*unknown), Stop) == []
    assert device.core.dropped["old-receipt"] > 0
    seq = published(device.actions, "status")[-1].seq
    (stop,) = of(device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "unknown")), Stop)
    assert stop.code == 3


# As processes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    try:
        software = running.choose(running.Engine.MOSQUITTO)
    except ConfigError as error:
        pytest.skip(str(error))
    with (
        running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker,
        serving(broker.url) as started,
    ):
        yield started
    reap()


@pytest.mark.slow
def test_a_process_outlives_the_replay_and_believes_the_truth(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path, "pi", "--partition", "iid:0/2")
    key = DeviceDirectory(folder).identity().key_id
    enrolled_under = outbox.summary(folder).state.receipt_seq
    assert enrolled_under > 0

    def unknown(seq: int, frame_seq: int | None = None) -> Message:
        receipt = Receipt(device="pi", device_key=key, seq=seq, outcome="unknown", version=0)
        topic = topics.down(FEDERATION, "pi", Receipt.KIND)
        return topic, server.scripted.frame(Receipt.KIND, receipt.meta(), seq=frame_seq)

    process = edge("run", folder)
    server.until(lambda: server.statuses)
    replayed = [unknown(seq, enrolled_under - 1) for seq in range(2, 400)]
    server.publish(*replayed)
    server.until_more_updates_than(len(server.updates) + 1)
    assert process.poll() is None
    server.answer = lambda frame: "unknown"
    code, said = server.until_ended(process)
    assert code == 3, said
    assert "does not know this device" in said
