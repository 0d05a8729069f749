"""`seal = true`: what the operator of a broker can read of a federation of real processes, and what not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stranger.servers import Aggregator
from support.brokers import Inbox, linked
from ternbus.aggregator.shell.administration import KEY
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import read_key
from ternbus.broker.link.link import Arrived
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.server import running
from ternbus.edge.learn.task_loader import load_task

pytestmark = pytest.mark.slow

TASK = "digits-numpy"
VERSIONS = 3
DEVICES = ("pi-1", "pi-2")


def edge(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ternbus", "edge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    try:
        software = running.choose(running.Engine.MOSQUITTO)
    except ConfigError as error:
        pytest.skip(str(error))
    with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        yield broker.url


def watched(url: str, folder: Path, *, seal: bool) -> list[Frame]:
    """Run two devices to their third accepted update; every frame that went through the broker but for the model's.

    The model is for everybody, and a version made of one update (one device alone was online) is that update.
    """
    save_safetensors(folder / "model.safetensors", load_task(TASK).initial(1), {})
    settings: dict[str, object] = {"plan.seal": str(seal).lower(), "merge.buffer_size": 2, "limits.frame_bytes": 4096}
    aggregator = Aggregator(
        folder / "agg", federation="lab", broker=url, model=folder / "model.safetensors", settings=settings
    )
    with linked(url, "operator") as (link, inbox):
        link.subscribe(["#"])
        with aggregator:
            invitations = aggregator.invite(*DEVICES)
            devices = [
                edge("join", invitations[name], folder / name, "--task", TASK, "--partition", f"iid:{place}/2", "--run")
                for place, name in enumerate(DEVICES)
            ]
            try:
                frames = until_accepted(inbox)
            finally:
                said = [ended(device) for device in devices]
    assert all("loss" in each for each in said)  # the device itself may say it
    return [frame for frame in frames if frame.kind not in {"delta", "snapshot"}]


def ended(device: subprocess.Popen[str]) -> str:
    device.terminate()
    return device.communicate(timeout=60)[0]


def until_accepted(inbox: Inbox) -> list[Frame]:
    frames: list[Frame] = []
    accepted = 0
    while accepted < VERSIONS * len(DEVICES):
        payload = inbox.until(Arrived).payload
        if payload:
            frames.append(parse(payload))
            accepted += frames[-1].kind == "receipt" and frames[-1].meta["outcome"] == "accepted"
    return frames


def messages(frames: list[Frame]) -> dict[tuple[str, int], tuple[Frame, bytes]]:
    """The updates, by device and number, whole."""
    parts: dict[tuple[str, int], dict[int, Frame]] = {}
    for frame in frames:
        if frame.kind == "update":
            parts.setdefault((frame.sender, frame.seq), {})[frame.part] = frame
    whole = {name: found for name, found in parts.items() if len(found) == found[min(found)].parts}
    return {name: (found[0], b"".join(found[place].body for place in sorted(found))) for name, found in whole.items()}


def journal(folder: Path) -> dict[tuple[str, int], bytes]:
    ledger = Ledger(folder / "agg" / LEDGER, read_only=True)
    try:
        query = "SELECT device, seq, segment, place, size, checksum FROM updates WHERE segment IS NOT NULL"
        rows = ledger.db.execute(query).fetchall()
        return {(device, seq): ledger.body(*place) for device, seq, *place in rows}
    finally:
        ledger.close()


def test_the_broker_carries_sizes_and_nothing_of_what_was_learned(url: str, tmp_path: Path) -> None:
    frames = watched(url, tmp_path, seal=True)
    carried = b"".join(frame.header + frame.body for frame in frames)
    key, kept = Identity(read_key(tmp_path / "agg" / KEY)), journal(tmp_path)
    updates = messages(frames)
    assert len(updates) >= VERSIONS * len(DEVICES)
    for (device, seq), (frame, body) in updates.items():
        assert dict(frame.meta) | {"base": 0, "samples": 1} == {
            "base": 0,
            "samples": 1,
            "codec": "ternary",
            "encoding": frame.meta["encoding"],
            "sealed": True,
            "metrics": {},
        }
        plain = key.unseal(body)
        assert plain[:16] == frame.key + seq.to_bytes(8, "little")
        assert len(body) == len(plain) + 48
        encoded = plain[16:]
        assert kept.get((device, seq), encoded) == encoded  # the aggregator's journal has it open
        assert not [start for start in range(0, len(encoded) - 16, 16) if encoded[start : start + 16] in carried]
    assert len(kept.keys() & updates.keys()) >= 2
    assert {"update", "receipt", "status", "head", "enroll"} <= {frame.kind for frame in frames}
    assert b"loss" not in carried
    assert b"accuracy" not in carried


def test_without_it_the_broker_carries_the_updates_and_their_metrics(url: str, tmp_path: Path) -> None:
    """That the test above would notice."""
    frames = watched(url, tmp_path, seal=False)
    kept = journal(tmp_path)
    updates = messages(frames)
    assert [name for name in kept if name in updates and updates[name][1] == kept[name]]
    said = {name for frame, _ in updates.values() for name in frame.meta["metrics"]}
    assert said == {"loss", "accuracy", "seconds", "steps"}
