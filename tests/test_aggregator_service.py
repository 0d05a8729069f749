"""The aggregator's service and its threads: one opens large frames ahead, another adds updates up."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from support.brokers import WITHIN_S, Inbox, linked
from support.commands import typed
from support.small_world import LAB, Device, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.merge.background import WORTHWHILE
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.shell import administration, backup
from ternbus.aggregator.shell import service as service_module
from ternbus.aggregator.shell.preverify import WORTHWHILE_BYTES
from ternbus.aggregator.shell.service import SWITCH_S, Service
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.bodies import Bodies
from ternbus.aggregator.store.ledger import LEDGER, Ledger, reading
from ternbus.broker.errors import LinkError
from ternbus.broker.link.events import Arrived, Disconnected, Published, Token
from ternbus.broker.link.link import Link
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.messages import Receipt, Status
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.broker.server.running import Engine, choose, start

pytestmark = pytest.mark.slow

RECEIPTS: Final = topics.down(LAB, "pi", "receipt")


def noted(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, when: Callable[..., bool] = lambda *_: True
) -> list[str]:
    """In which threads a method is called from now on."""
    threads: list[str] = []
    method = getattr(owner, name)

    def noting(*args: Any, **named: Any) -> Any:
        if when(*args):
            threads.append(threading.current_thread().name.partition("_")[0])
        return method(*args, **named)

    monkeypatch.setattr(owner, name, noting)
    return threads


@dataclass(slots=True)
class World:
    """A broker, an aggregator that is not running yet, and its one device's update on version 0."""

    url: str
    service: Service
    frame: bytes
    errors: list[BaseException] = field(default_factory=list)  # with which the service ended

    def run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:  # noqa: BLE001 - it is looked at in another thread
            self.errors.append(error)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    model = {"w": np.zeros((1000, WORTHWHILE // 1000), dtype=np.float32)}
    schema = Schema.of({name: array.shape for name, array in model.items()})
    device, directory = Device("pi", schema), tmp_path / "aggregator"
    (frame,) = device.update(ternary_block(schema, 1), base=0, encoding="zstd", frame_bytes=2**20)
    assert len(frame) > WORTHWHILE_BYTES
    with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        administration.create(
            directory, federation=LAB, broker=broker.url, model=model, settings={"merge.buffer_size": 2}
        )
        ledger = Ledger(directory / LEDGER)
        ledger.write([records.DeviceEnrolled(device="pi", public=device.identity.public, proof=bytes(32))])
        ledger.close()
        yield World(broker.url, Service(directory, "test", lambda _, **__: None), frame)


@contextmanager
def running(world: World) -> Iterator[tuple[threading.Thread, Link, Inbox]]:
    """The aggregator in a thread, and its device's link once the aggregator is there."""
    thread = threading.Thread(target=world.run)
    thread.start()
    try:
        with linked(world.url, "pi") as (link, inbox):
            link.subscribe([RECEIPTS, topics.status(LAB)])
            inbox.until(Arrived)  # the aggregator's status, retained
            yield thread, link, inbox
    finally:
        world.service.stop()
        thread.join(WITHIN_S)
    assert not thread.is_alive()


def test_a_revocation_that_does_not_reach_the_backups_is_in_the_log(world: World, tmp_path: Path) -> None:
    lines: list[str] = []
    directory, out = world.service.directory, tmp_path / "out"
    backup.backup(directory, out, None, "test")
    out.rename(tmp_path / "away")
    world.service = Service(directory, "test", lambda text, **_: lines.append(text))
    with running(world):
        administration.revoke(directory, "pi", "test")
    (line,) = [line for line in lines if line.startswith(backup.NOT_COPIED)]
    assert f"{out} is away: mount it" in line


def test_who_asks_for_statistics_is_told_first_whom_and_for_how_long(world: World, tmp_path: Path) -> None:
    with running(world):
        said = typed(tmp_path, "aggregator", "statistics", world.service.directory, "--wait", 0)
    assert said.splitlines()[:2] == [
        "ternbus: asked 1 device; waiting up to 0 s for answers (--wait)",
        "0 devices answered",
    ]


@pytest.mark.parametrize("adders", [1, 3])
def test_a_large_update_is_opened_and_added_in_threads_of_their_own(
    world: World, adders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.service.adders = adders
    verified = noted(monkeypatch, Frame, "check_authentic", lambda about, _: about.kind == "update")
    read = noted(monkeypatch, Block, "read")
    added = noted(monkeypatch, ExactSum, "add_all")
    with running(world) as (_, link, inbox):
        link.publish(topics.up(LAB, "pi", "update"), world.frame)
        while (arrived := inbox.until(Arrived)).topic != RECEIPTS:
            pass
        assert Receipt.from_meta(parse(arrived.payload).meta).outcome == "accepted"
        assert (verified, read) == (["preverifier"], ["preverifier"])  # once each, and the core is left nothing of it
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    assert world.errors == []
    assert added == ["adding"]
    assert sys.getswitchinterval() > SWITCH_S


def test_what_a_merge_is_made_of_is_written_by_another_thread_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.service.directory / administration.TOML
    path.write_text(path.read_text().replace("buffer_size = 2", "buffer_size = 1"))
    written, synced = noted(monkeypatch, Bodies, "_append"), noted(monkeypatch, Bodies, "_sync")
    with running(world) as (_, link, inbox):
        link.publish(topics.up(LAB, "pi", "update"), world.frame)
        while inbox.until(Arrived).topic != RECEIPTS:
            pass
        assert (written, synced.count("bodies")) == (["bodies"], 1)  # once, and durable before the ledger looks
    assert world.errors == []
    with reading(world.service.directory) as ledger:
        (place,) = ledger.db.execute("SELECT segment, place, size, checksum FROM updates").fetchall()
        assert (ledger.version, len(ledger.body(*place))) == (1, place[2])


def test_where_the_disk_fails_the_service_ends_and_nobody_is_told_of_what_is_not_on_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Ledger.write

    def fail(ledger: Ledger, batch: list[records.Record]) -> None:
        if any(isinstance(record, records.UpdateAccepted) for record in batch):
            raise OSError(ENOSPC, "no space left")
        write(ledger, batch)

    monkeypatch.setattr(Ledger, "write", fail)
    with running(world) as (thread, link, inbox):
        link.publish(topics.up(LAB, "pi", "update"), world.frame)
        thread.join(WITHIN_S)
        assert not thread.is_alive()
        told: list[str] = []
        while not told or told[-1] != "offline":  # the last will
            arrived = inbox.until(Arrived)
            assert arrived.topic == topics.status(LAB), "a receipt of what is not on the disk"
            told.append(Status.from_meta(parse(arrived.payload).meta).state)
    assert [type(error) for error in world.errors] == [OSError]
    monkeypatch.undo()
    world.service = Service(world.service.directory, "test", lambda _, **__: None)
    with running(world) as (_, link, inbox):  # the broker delivers it again, and so does the device
        link.publish(topics.up(LAB, "pi", "update"), world.frame)
        while (arrived := inbox.until(Arrived)).topic != RECEIPTS:
            pass
        assert Receipt.from_meta(parse(arrived.payload).meta).outcome == "accepted"
    assert statuses.read(world.service.directory)["counts"]["accepted"] == 1


def test_a_stop_goes_before_the_messages_that_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not acknowledged, so that the broker delivers them at the next start."""
    handed = noted(monkeypatch, Core, "_message")
    acknowledged = noted(monkeypatch, Link, "acknowledge")
    for number in range(100):
        token = Token(connection=1, mid=number + 1)
        world.service._deliver(Arrived(topic="nonsense", payload=b"", retained=False, token=token))
    world.service.stop()
    world.run()
    assert (world.errors, handed, acknowledged) == ([], [], [])


def test_what_a_broker_shows_ends_no_process_for_good(tmp_path: Path) -> None:
    """A head of a version to come: going on would do harm, but it is no mistake in the configuration."""
    service = Service(tmp_path, "test", lambda _, **__: None)
    with pytest.raises(LinkError, match="restored from a backup"):
        service._perform([events.Stop(error="was it restored from a backup?")])


def test_a_broker_that_acknowledges_no_answer_gets_a_bounded_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It repeats an update that was answered, which is answered again: the queue grew by megabytes a second."""
    monkeypatch.setattr(service_module, "ANSWER_BYTES_MAX", 10_000)
    service, sent, handled = world.service, list[str](), list[Any]()

    class Broker:
        dropped = 0

        def publish(self, topic: str, _: bytes, *, retain: bool) -> int:
            sent.append(topic)
            return len(sent)

    class Told:
        awaited = frozenset[str]()

        def handle(self, event: Any, _: float) -> list[events.Action]:
            handled.append(event)
            return []

    service._link, service._core = Broker(), Told()  # type: ignore[assignment]
    for _ in range(100):
        service._publish(RECEIPTS, bytes(1000), retain=False)
    service._publish(topics.head(LAB), bytes(1000), retain=True)
    assert sent == [RECEIPTS] * 11 + [topics.head(LAB)]
    service._count_dropped()
    assert [(event.reason, event.count) for event in handled] == [("unacknowledged", 89)]
    service._translate(Published(ticket=1), [])
    service._publish(RECEIPTS, bytes(1000), retain=False)
    service._translate(Disconnected(reason="gone"), [])
    assert len(sent) == 13
    assert (service._answer_bytes, service._answers) == (0, {})
    service._count_dropped()
    assert len(handled) == 2  # and the disconnection
