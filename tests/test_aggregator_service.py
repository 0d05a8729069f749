"""The running aggregator uses its threads: large frames are opened ahead in one, and added up in another."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import Inbox
from small_world import LAB, Device, ternary_block

from aggregator import home, records
from aggregator.accumulator import Accumulator
from aggregator.background import WORTHWHILE
from aggregator.gate import WORTHWHILE_BYTES
from aggregator.ledger import Ledger
from aggregator.service import SWITCH_S, Service
from broker import topics
from broker.events import Arrived, Connected
from broker.frame import Frame, parse
from broker.link import Link
from broker.messages import Receipt
from broker.running import Engine, choose, start
from broker.schema import Schema
from broker.ternary import Block

pytestmark = pytest.mark.slow


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


def test_a_large_update_is_opened_and_added_in_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"w": np.zeros((1000, WORTHWHILE // 1000), dtype=np.float32)}
    schema = Schema.of({name: array.shape for name, array in model.items()})
    device, directory = Device("pi", schema), tmp_path / "aggregator"
    (frame,) = device.update(ternary_block(schema, 1), base=0, encoding="zstd", frame_bytes=2**20)
    assert len(frame) > WORTHWHILE_BYTES
    with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        home.create(directory, federation=LAB, broker=broker.url, model=model, settings={"merge.buffer_size": 2})
        ledger = Ledger(directory / home.LEDGER)
        ledger.write([records.DeviceEnrolled(device="pi", public=device.identity.public, proof=bytes(32))])
        ledger.close()
        verified = noted(monkeypatch, Frame, "check_authentic", lambda about, _: about.kind == "update")
        read = noted(monkeypatch, Block, "read")
        added = noted(monkeypatch, Accumulator, "add")
        service = Service(directory, "test", lambda _: None)
        running = threading.Thread(target=service.run)
        running.start()
        inbox, topic = Inbox(), topics.down(LAB, "pi", "receipt")
        link = Link(broker.url, client_id="pi", deliver=inbox.put)
        try:
            link.connect(topics.up(LAB, "pi", "status"), b"")
            inbox.next(Connected)
            link.subscribe([topic, topics.status(LAB)])
            inbox.until(Arrived)  # the aggregator's status, retained: it is there
            link.publish(topics.up(LAB, "pi", "update"), frame)
            while (arrived := inbox.until(Arrived)).topic != topic:
                pass
            assert Receipt.from_meta(parse(arrived.payload).meta).outcome == "accepted"
            assert (verified, read) == (["gate"], ["gate"])  # once each, and the core is left nothing of it
            assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        finally:
            link.disconnect()
            service.stop()
            running.join(20)
    assert not running.is_alive()
    assert added == ["adding"]
    assert sys.getswitchinterval() > SWITCH_S
