"""Snapshots on real brokers: both hold all their parts, and one that drops large messages is noticed."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.brokers import WITHIN_S, Inbox
from support.small_world import LAB
from ternbus.aggregator.core import retained
from ternbus.aggregator.core.events import Action
from ternbus.aggregator.core.retained import Retained
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.service import Service
from ternbus.broker.link import link
from ternbus.broker.link.connection import MQTT_311
from ternbus.broker.link.events import Connected
from ternbus.broker.link.link import Link
from ternbus.broker.protocol import topics
from ternbus.broker.server.running import ACCESS, Engine, RunningBroker, choose, start

pytestmark = pytest.mark.slow

FRAME_BYTES = 32_768
Lines = queue.SimpleQueue[str]


@contextmanager
def serving(broker: RunningBroker, directory: Path) -> Iterator[Lines]:
    """An aggregator in a thread, and what it logs; its snapshot has 12 parts."""
    model = {"w": np.random.default_rng(1).normal(size=(1000, 100)).astype(np.float32)}
    administration.create(
        directory, federation=LAB, broker=broker.url, model=model, settings={"limits.frame_bytes": FRAME_BYTES}
    )
    lines: Lines = queue.SimpleQueue()
    service = Service(directory, "test", lambda text, **_: lines.put(text))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        service.stop()
        thread.join(WITHIN_S)
    assert not thread.is_alive()


def until(lines: Lines, text: str) -> list[str]:
    """The lines up to one that contains ``text``."""
    found = [""]
    while text not in found[-1]:
        found.append(lines.get(timeout=WITHIN_S))
    return found[1:]


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_broker_that_holds_every_part_gives_no_reason_to_complain(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retained, "ASK_S", 5.0)  # nats-server delivers some of what it holds, where many are asked for
    looked: queue.SimpleQueue[Retained] = queue.SimpleQueue()
    conclude = Retained._conclude

    def concluded(about: Retained, now: float) -> list[Action]:
        actions = conclude(about, now)
        looked.put(about)
        return actions

    monkeypatch.setattr(Retained, "_conclude", concluded)
    with (
        start(choose(engine), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker,
        serving(broker, tmp_path / "aggregator") as lines,
    ):
        until(lines, "connected")
        assert looked.get(timeout=WITHIN_S)._lost == {}
        assert lines.empty()


@pytest.mark.parametrize("says_so", [True, False], ids=["MQTT 5", "MQTT 3.1.1"])
def test_a_broker_that_drops_a_part_is_named_and_given_it_again(
    says_so: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MQTT 3.1.1 has no code for it: the broker acknowledges what it drops."""
    monkeypatch.setattr(retained, "ASK_S", 1.0)
    monkeypatch.setattr(retained, "RETRY_S", 0.2)
    if not says_so:
        monkeypatch.setattr(link, "MQTT_5", MQTT_311)
    part = topics.snapshot(LAB, 0, 1)
    with start(choose(Engine.MOSQUITTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        access = broker.directory / ACCESS
        allowed = access.read_text()
        access.write_text(f"pattern deny {part}\n{allowed}")
        broker.reload()
        with serving(broker, tmp_path / "aggregator") as lines:
            expected = (
                f"the broker refused {part}: Not authorized"
                if says_so
                else f"messages with which devices begin ({part}), though it acknowledged them"
            )
            assert until(lines, expected)[-1].endswith("; it is published again")
            access.write_text(allowed)
            broker.reload()
            assert until(lines, "the broker holds all retained messages again")[:-1] == []


def test_a_broker_that_refuses_a_large_message_is_explained_at_once(tmp_path: Path) -> None:
    """Mosquitto with a message_size_limit answers with a code that MQTT 5 has not in a PUBACK, and paho refuses."""
    with start(choose(Engine.MOSQUITTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        configuration = broker.directory / "mosquitto.conf"
        configuration.write_text(f"{configuration.read_text()}\nmessage_size_limit {FRAME_BYTES // 2}\n")
        broker.reload()
        with serving(broker, tmp_path / "aggregator") as lines:
            before = until(lines, ": Packet too large; lower limits.frame_bytes in aggregator.toml")
            assert "message_size_limit" in before[-1]
            assert not [line for line in before if "connection lost" in line]


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_head_that_a_broker_no_longer_holds_is_given_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the connection lasts. Where both brokers hold it, they show it again to who has subscribed already."""
    monkeypatch.setattr(retained, "ASK_S", 5.0)
    monkeypatch.setattr(retained, "LOOK_S", 2.0)
    monkeypatch.setattr(retained, "RETRY_S", 0.2)
    looked: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    conclude = Retained._conclude

    def concluded(about: Retained, now: float) -> list[Action]:
        looked.put(dict(about._lost))
        return conclude(about, now)

    monkeypatch.setattr(Retained, "_conclude", concluded)
    with (
        start(choose(engine), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker,
        serving(broker, tmp_path / "aggregator") as lines,
    ):
        until(lines, "connected")
        assert [looked.get(timeout=WITHIN_S) for _ in range(4)] == [{}] * 4  # the snapshot; then head and status
        inbox = Inbox()
        other = Link(broker.url, client_id="other", deliver=inbox.put)
        other.connect(topics.up(LAB, "other", "status"), b"")
        inbox.next(Connected)
        other.publish(topics.head(LAB), b"", retain=True)
        inbox.settled()
        line = until(lines, "the broker does not hold 1 of the messages")[-1]
        assert topics.head(LAB) in line
        until(lines, "the broker holds all retained messages again")
        assert inbox.stored(other, [topics.head(LAB)])
        other.disconnect(flush_s=0.0)
