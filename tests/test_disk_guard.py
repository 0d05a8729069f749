"""A disk that fills up: a warning first, then nothing more is accepted until there is room again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.brokers import WITHIN_S, linked
from support.small_disk import LIMITED
from support.small_world import LAB, Bench, Device, initial_model, receipts, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import disk
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.link.events import Arrived
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.messages import Receipt, Status
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.server.running import Engine, choose, start

Make = Callable[..., Bench]
MEBIBYTE = 2**20
IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=16m,mode=0700 none "$2"
cp -a "$1/." "$2"
if [ "$3" = full ]; then head -c 16m /dev/zero > "$2/filling" || true; fi 2>/dev/null
exec "$4" -m ternbus aggregator run "$2"
"""


def logged(actions: list[events.Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, events.Log)]


def test_the_operator_is_told_once_of_each_change(make: Make) -> None:
    bench = make()
    told = [logged(bench.handle(events.DiskChecked(free=free))) for free in (0.5, 0.0999, 0.07, 0.0499, 0.0, 0.05, 0.1)]
    assert told == [
        [],
        ["10.0% of the disk is free: below 5% updates are answered `busy`"],
        [],
        ["5.0% of the disk is free: updates are answered `busy` below 5%; free some space"],
        [],
        ["5.0% of the disk is free: below 5% updates are answered `busy`"],
        ["10.0% of the disk is free: enough"],
    ]


def test_on_a_disk_that_is_almost_full_nothing_is_accepted_until_there_is_room(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.handle(events.DiskChecked(free=0.04))
    frames = pi.update(ternary_block(bench.schema, 1), 0)
    for kind, frame in [("update", frames[0]), ("offer", pi.offer(0, 1))]:
        (receipt,) = receipts(bench.receive(pi.topic(kind), frame))
        assert (receipt.outcome, receipt.reason) == ("busy", "the aggregator's disk is almost full")
        assert receipt.retry_after_s == 30.0
        assert not [action for action in bench.last if isinstance(action, events.Save)]
    bench.handle(events.DiskChecked(free=0.06))
    (receipt,) = receipts(bench.receive(pi.topic("update"), *frames))
    assert (receipt.outcome, bench.version) == ("accepted", 1)


def test_the_status_says_how_much_is_free(make: Make) -> None:
    bench = make()
    found = statuses.read(bench.directory)["disk"]
    assert found["free"] == pytest.approx(disk.free(bench.directory), abs=0.05)
    assert found["state"] in {"enough", "low", "full"}


def test_a_file_system_that_does_not_say_is_no_reason_to_stop(tmp_path: Path) -> None:
    assert disk.free(tmp_path / "none") == 1.0
    assert disk.free(Path("/proc")) == 1.0


# --- the process


def mounts() -> bool:
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(trial, capture_output=True, check=False).returncode == 0


pytestmark_process = pytest.mark.skipif(os.geteuid() != 0 or not mounts(), reason="only root can mount a small disk")


@dataclass(slots=True)
class World:
    """A broker, an aggregator's directory with one device, and an empty folder for a disk of 16 MiB."""

    url: str
    directory: Path
    place: Path
    device: Device
    schema: Schema
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, how: str = "empty") -> subprocess.Popen[str]:
        arguments = [str(self.directory), str(self.place), how, sys.executable]
        command = ["unshare", "-m", "sh", "-c", IN_A_SMALL_DISK, "sh", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        return process


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        directory = tmp_path / "aggregator"
        administration.create(
            directory, federation=LAB, broker=broker.url, model=initial_model(), settings={"merge.buffer_size": 1}
        )
        with closing(Ledger(directory / LEDGER)) as ledger:
            device = Device("pi", schema := ledger.schema())
            ledger.write([records.DeviceEnrolled(device="pi", public=device.identity.public, proof=bytes(32))])
        (tmp_path / "place").mkdir()
        world = World(broker.url, directory, tmp_path / "place", device, schema)
        yield world
        for process in world.started:
            process.kill()
            process.communicate()


def until(process: subprocess.Popen[str], text: str) -> None:
    """Read its log up to a line with this text."""
    assert process.stderr is not None
    while text not in (line := process.stderr.readline()):
        assert line, f"it ended before it said {text!r}"


@pytestmark_process
@pytest.mark.slow
def test_the_process_stops_accepting_and_goes_on_by_itself(world: World) -> None:
    process = world.run()
    until(process, "connected")
    filling = Path(f"/proc/{process.pid}/root{world.place}/filling")  # through its own mounts
    about = os.statvfs(filling.parent)
    filling.write_bytes(bytes(int(about.f_bavail * about.f_frsize - 0.03 * 16 * MEBIBYTE)))
    until(process, "updates are answered `busy`")
    (frame,) = world.device.update(ternary_block(world.schema, 1), 0)
    with linked(world.url, "pi") as (link, inbox):
        link.subscribe([topics.down(LAB, "pi", "receipt")])

        def answer() -> Receipt:
            link.publish(world.device.topic("update"), frame)
            return Receipt.from_meta(parse(inbox.until(Arrived).payload).meta)

        assert answer().outcome == "busy"
        filling.unlink()
        until(process, "of the disk is free: enough")
        assert answer().outcome == "accepted"
    process.terminate()
    assert process.wait(WITHIN_S) == 0


@pytestmark_process
@pytest.mark.slow
def test_on_a_full_disk_the_process_ends_with_one_line_and_may_be_restarted(world: World) -> None:
    process = world.run("full")
    _, said = process.communicate(timeout=WITHIN_S)
    last = said.splitlines()[-1]
    assert process.returncode == 1, said
    assert last.startswith("ternbus: "), said
    assert str(world.place) in last
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_process_whose_disk_takes_no_more_ends_with_one_line_and_is_offline(world: World) -> None:
    limit = str((world.directory / LEDGER).stat().st_size + 100_000)  # of each file; the log of SQLite is soon larger
    command = [sys.executable, "-c", LIMITED, limit, "aggregator", "run", str(world.directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    world.started.append(process)
    until(process, "connected")
    with linked(world.url, "pi") as (link, inbox):
        link.subscribe([topics.down(LAB, "pi", "receipt"), topics.status(LAB)])
        base, sent, state = 0, -1, ""
        while state != "offline":  # the last will
            arrived = inbox.until(Arrived)
            if arrived.topic == topics.status(LAB):
                state = Status.from_meta(parse(arrived.payload).meta).state
            else:
                assert Receipt.from_meta(parse(arrived.payload).meta).outcome == "accepted"
                base += 1
            if base > sent:
                (frame,) = world.device.update(ternary_block(world.schema, base), base)
                link.publish(world.device.topic("update"), frame)
                sent = base
    _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1, said
    assert str(world.directory) in said.splitlines()[-1]
    assert "Traceback" not in said
