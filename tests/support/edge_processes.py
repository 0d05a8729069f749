"""Processes of devices on a real mosquitto, against an aggregator made of broker's primitives."""

import json
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.scripted_aggregator import FEDERATION, Message, ScriptedAggregator
from ternbus.broker.errors import ConfigError
from ternbus.broker.link.link import Arrived, Link
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import enroll_proof, key_id
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Enroll, Metrics, Status
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.broker.server import running
from ternbus.edge.learn.task_loader import load_task

ROOT = Path(__file__).resolve().parent.parent.parent
WITHIN_S = 60.0
TASK = "digits-numpy"
CODE = "c" * 32


class Server:
    """Answers devices as a test says; every frame that it believes is checked as the protocol wants."""

    def __init__(self, url: str, **plan: Any) -> None:
        model = load_task(TASK).initial(1)
        schema = Schema.of({name: tensor.shape for name, tensor in model.items()})
        self.scripted = ScriptedAggregator(schema=schema, slots=8, frame_bytes=8000, plan=plan)
        self.scripted.vectors[0] = to_vector(schema, model)
        self.url = url
        self.keys: dict[str, bytes] = {}
        self.updates: list[Frame] = []
        self.sizes: list[int] = []  # of all frames of updates
        self.metrics: list[Metrics] = []
        self.statuses: list[Status] = []
        self.answer: Callable[[Frame], str | None] = lambda _: "accepted"
        self._collector = Collector(8, 2**24)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.link = Link(url, client_id="aggregator-fed", deliver=self._queue.put)

    def start(self) -> None:
        topic, will = self.scripted.status("offline")
        self.link.connect(topic, will)
        self.link.subscribe([f"ternbus/1/{FEDERATION}/up/#"])
        self.publish(*self.scripted.snapshot(), self.scripted.head(), self.scripted.status())

    def publish(self, *messages: Message) -> None:
        for topic, payload in messages:
            self.link.publish(topic, payload, retain="/all/" in topic)

    def invite(self, folder: Path, device: str, code: str = CODE) -> Path:
        invitation = Invitation(
            federation=FEDERATION,
            device=device,
            broker=self.url,
            aggregator_key=self.scripted.identity.public.hex(),
            code=code,
        )
        path = folder / f"{device}.toml"
        path.write_text(invitation.dumps())
        return path

    def until(self, done: Callable[[], object]) -> None:
        """Answer what comes until something holds."""
        deadline = time.monotonic() + WITHIN_S
        while not done():
            try:
                event = self._queue.get(timeout=0.2)
            except queue.Empty:
                assert time.monotonic() < deadline, "it took too long"
                continue
            if isinstance(event, Arrived):
                self._arrived(event)
                self.link.acknowledge([event.token])

    def until_more_updates_than(self, count: int) -> None:
        self.until(lambda: len(self.updates) > count)

    def until_ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """The exit code, and what it printed."""
        self.until(lambda: process.poll() is not None)
        out, err = process.communicate()
        return process.returncode, out + err

    def _arrived(self, message: Arrived) -> None:
        if not message.payload:
            return
        frame = parse(message.payload)
        address = topics.parse(message.topic)
        topics.check(frame, address)
        assert address.device is not None
        if frame.kind == "enroll":
            self._enroll(frame)
            return
        if frame.sender not in self.keys or frame.key != key_id(self.keys[frame.sender]):
            return  # the last will of one that was refused
        frame.check_authentic(self.keys[frame.sender])
        if frame.kind == "update":
            self.sizes.append(len(message.payload))
        if frame.kind == "status":
            self.statuses.append(Status.from_meta(frame.meta))
        elif frame.kind == "metrics":
            self.metrics.append(Metrics.from_meta(frame.meta))
        elif frame.kind == "update" and self._collector.add(frame) is not None:
            self.updates.append(frame)
            if (outcome := self.answer(frame)) is not None:
                self.publish(self.scripted.receipt(frame.sender, frame.key, frame.seq, outcome))
                if outcome == "accepted":
                    self.next_version()

    def _enroll(self, frame: Frame) -> None:
        public = Enroll.from_meta(frame.meta).public_key
        frame.check_authentic(public)
        good = frame.body == enroll_proof(CODE, FEDERATION, frame.sender, public)
        if good:
            self.keys[frame.sender] = public
        outcome = "enrolled" if good else "refused"
        self.publish(
            self.scripted.receipt(frame.sender, key_id(public), frame.seq, outcome, reason="" if good else "code")
        )

    def next_version(self) -> None:
        self.scripted.advance()
        version = self.scripted.version
        snapshot = self.scripted.new_snapshot() if version - self.scripted.snapshot_version >= 4 else []
        self.publish(*self.scripted.delta(version), *snapshot, self.scripted.head())


@contextmanager
def serving(url: str, **plan: Any) -> Iterator[Server]:
    server = Server(url, **plan)
    server.start()
    try:
        yield server
    finally:
        server.link.disconnect(flush_s=0.0)


STARTED: list[subprocess.Popen[str]] = []


def reap() -> None:
    """End what is left of the processes of `edge`, wait for them, and close their pipes."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
        with process:
            pass


@contextmanager
def answering(folder: Path) -> Iterator[Server]:
    """A server on a mosquitto of its own; at the end nothing runs any more. The test is skipped without mosquitto."""
    try:
        software = running.choose(running.Engine.MOSQUITTO)
    except ConfigError as error:
        pytest.skip(str(error))
    with (
        running.start(software, host="127.0.0.1", port=0, directory=folder / "broker") as broker,
        serving(broker.url) as server,
    ):
        try:
            yield server
        finally:
            reap()


def edge(*arguments: object, cwd: Path = ROOT) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ternbus", "edge", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    STARTED.append(process)
    return process


def joined(server: Server, tmp_path: Path, device: str = "pi", *options: object, task: str = TASK) -> Path:
    invitation = server.invite(tmp_path, device)
    code, said = server.until_ended(edge("join", invitation, tmp_path / device, "--task", task, *options))
    assert code == 0, said
    assert f"{device} has joined {FEDERATION}" in said
    return tmp_path / device


def status_of(folder: Path) -> dict[str, Any]:
    out, _ = edge("status", folder, "--json").communicate()
    found: dict[str, Any] = json.loads(out)
    return found
