"""A broker whose disk is full: `broker up` says so, and its clients tell it apart from a broker without TLS."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.brokers import WITHIN_S, Inbox
from ternbus.broker.errors import LinkError
from ternbus.broker.link.link import Link
from ternbus.broker.server import full_disk, running
from ternbus.broker.server.full_disk import FullDisk
from ternbus.broker.server.running import Engine, choose, start

FILL = "fill"


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-28T18:56:48: Error: No space left on device.",
        "[15083] [ERR] JetStream failed to store a msg on stream '$G > $MQTT_rmsgs': no space left on device",
        "[ERR] insufficient storage resources available (10047)",
    ],
)
def test_the_broker_s_log_tells_of_a_full_disk_from_the_last_look_on(line: str, tmp_path: Path) -> None:
    log = tmp_path / "broker.log"
    disk = FullDisk(log=log)
    assert not disk.is_seen()  # no log yet
    log.write_text("listening\n")
    assert not disk.is_seen()
    with log.open("a") as file:
        file.write(f"{line}\n")
    assert disk.is_seen()
    assert str(tmp_path) in disk.explanation
    assert not disk.is_seen()


def test_a_disk_without_room_is_full_even_if_the_log_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broker.log").touch()
    monkeypatch.setattr(full_disk, "ROOM_BYTES", 1 << 62)
    assert FullDisk(log=tmp_path / "broker.log").is_seen()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(disk / FILL, os.O_CREAT | os.O_WRONLY)
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


@pytest.mark.slow
def test_a_nats_server_that_cannot_start_for_its_full_disk_is_told_apart_from_one_with_tls(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts connections and closes them, as a port for TLS does."""
    software, directory = choose(Engine.NATS), small_disk / "broker"
    with start(software, host="127.0.0.1", port=0, directory=directory):
        pass
    fill(small_disk)
    monkeypatch.setattr(running, "READY_WITHIN_S", 1.0)
    with pytest.raises(LinkError, match=r"does not answer on mqtt://127.0.0.1:\d+; the disk that holds .* is full"):
        start(software, host="127.0.0.1", port=0, directory=directory)
    said: list[str] = []

    def look(broker: running.RunningBroker, *_: object) -> None:
        link = Link(broker.url, client_id="pi", deliver=Inbox().put)
        deadline = time.monotonic() + WITHIN_S
        while not said or "no broker listens" in said[-1]:
            assert time.monotonic() < deadline
            try:
                link.connect("ternbus/1/lab/up/pi/status", b"offline")
            except LinkError as error:
                said.append(str(error))

    monkeypatch.setattr(running, "_await_answer", look)
    with start(software, host="127.0.0.1", port=0, directory=directory):
        pass
    assert "the broker cannot serve now, as when its disk is full: see its log" in said[-1]
    (small_disk / FILL).unlink()
    monkeypatch.undo()
    with start(software, host="127.0.0.1", port=0, directory=directory):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_running_broker_whose_disk_becomes_full_is_reported_once(
    engine: Engine, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "LOOK_AT_DISK_S", 0.05)
    with start(choose(engine), host="127.0.0.1", port=0, directory=small_disk / "broker") as broker:
        fill(small_disk)
        said: list[str] = []

        def warn(text: str) -> None:
            said.append(text)
            broker.process.terminate()

        broker.wait(warn)
    (line,) = said
    assert line.startswith(f"the disk that holds {small_disk / 'broker'} is full")
