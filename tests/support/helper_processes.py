"""Processes of helpers on a real broker, against an aggregator made of broker's primitives."""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from support.private_sets import FEDERATION, SERVER, Asked, World, from_server
from ternbus.broker.crash_points import VARIABLE
from ternbus.broker.link.events import Arrived
from ternbus.broker.link.link import Link
from ternbus.broker.link.tls import Tls
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import enroll_proof, key_id
from ternbus.broker.protocol.invitation import HELPER, Invitation
from ternbus.broker.protocol.messages import Enroll, Receipt, Status
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.sums.sets import ABANDON, ABANDONED, OPEN, OPENED, PREPARE, PREPARED, REFUSED, Answer
from ternbus.broker.sums.terms import MASK, SignedCard, Terms

ROOT: Final = Path(__file__).resolve().parent.parent.parent
WITHIN_S: Final = 60.0
ASK_AGAIN_S: Final = 2.0
CODE: Final = "c" * 32
NAME: Final = "h-1"
STEPS: Final = {PREPARE: PREPARED, OPEN: OPENED, ABANDON: ABANDONED}
# Points at which a helper is killed; each is reached while it enrolls, or opens a set.
HELPING: Final = (
    "connect", "subscribe", "publish-enroll", "publish-card", "publish-card:3", "publish-status", "acknowledge:3",
    "save:3", "state-written:4", "state-written:5", "saved:4", "saved:5", "publish-answer", "publish-answer:2",
)  # fmt: skip


class Server:
    """Enrolls a helper and asks it, and asks again, as an aggregator does."""

    def __init__(self, url: str, tls: Tls | None = None) -> None:
        self.url = url
        self.public = b""
        self.card: SignedCard | None = None
        self.statuses: list[Status] = []
        self.answers: list[tuple[Answer, bytes]] = []
        self._seq = time.time_ns() // 1000  # above those of an earlier process
        self._collector = Collector(8, 2**24)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        name = f"aggregator-{FEDERATION}"
        self.link = Link(url, client_id=name, username=name, deliver=self._queue.put, tls=tls)

    def start(self) -> None:
        self.link.connect(*self._status("offline"))
        self.link.subscribe([topics.help_of(FEDERATION, "+", kind) for kind in ("enroll", "status", "card", "answer")])
        self.publish(self._status("online"), retain=True)

    def publish(self, *messages: tuple[str, bytes], retain: bool = False) -> None:
        for topic, payload in messages:
            self.link.publish(topic, payload, retain=retain)

    def ask(self, made: Asked, step: str, *, count: int = 0, more: Callable[[], object] = lambda: None) -> Answer:
        """The answer to a step, which is asked for again until it comes; ``more`` is called while it waits."""
        self.answers.clear()
        asked_s = 0.0

        def answered() -> bool:
            nonlocal asked_s
            more()
            if time.monotonic() > asked_s + ASK_AGAIN_S:
                asked_s = time.monotonic()
                self._seq += 1
                self.publish(*made.messages(NAME, step, count=count, seq=self._seq))
            return any(self._answers(answer, made, step) for answer, _ in self.answers)

        self.until(answered)
        self.answers = [each for each in self.answers if self._answers(each[0], made, step)]
        return self.answers[-1][0]

    def _answers(self, answer: Answer, made: Asked, step: str) -> bool:
        """Whether an answer is to this step: one that was asked for twice is answered twice, perhaps later."""
        return answer.set == made.digest and answer.outcome in {STEPS[step], REFUSED}

    def until(self, done: Callable[[], object]) -> None:
        """Answer what comes until something holds."""
        deadline = time.monotonic() + WITHIN_S
        while not done():
            assert time.monotonic() < deadline, "it took too long"
            try:
                event = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(event, Arrived):
                self._arrived(event)
                self.link.acknowledge([event.token])

    def _status(self, state: str) -> tuple[str, bytes]:
        self._seq += 1
        meta = Status(state=state, session=self._seq if state == "offline" else self._seq - 1).meta()
        return from_server(Status.KIND, meta, topics.status(FEDERATION), seq=self._seq)

    def _arrived(self, message: Arrived) -> None:
        frame = parse(message.payload)
        topics.check(frame, topics.parse(message.topic))
        if frame.kind == Enroll.KIND:
            public = Enroll.from_meta(frame.meta).public_key
            frame.check_authentic(public)
            assert frame.body == enroll_proof(CODE, FEDERATION, NAME, public)
            self.public = public
            self._receipt(frame.seq)
            return
        if not self.public:
            return  # the last will of one that was killed before it enrolled
        frame.check_authentic(self.public)
        if frame.kind == Status.KIND:
            self.statuses.append(Status.from_meta(frame.meta))
        elif frame.kind == "card":
            self.card = SignedCard.of_body(frame.body)
        elif (whole := self._collector.add(frame)) is not None:
            self.answers.append((Answer.from_meta(whole.meta), whole.body))

    def _receipt(self, seq: int) -> None:
        self._seq += 1
        message = Receipt(device=NAME, device_key=key_id(self.public), seq=seq, outcome="enrolled", version=0)
        topic = topics.help_of(FEDERATION, NAME, Receipt.KIND)
        self.publish(from_server(Receipt.KIND, message.meta(), topic, seq=self._seq))

    def world(self, version: int = 4) -> World:
        """Of the helper's newest card."""
        assert self.card is not None
        made = Terms(
            kind=MASK, bits=6, levels=1, helpers=(self.card,), min=2, ternary=40_000, dense=3, scales=(0.5, 0.25),
            samples=0.0,
        )  # fmt: skip
        return World(made, version=version)

    def set_of(self, *devices: str, version: int = 4) -> Asked:
        world = self.world(version)
        return world.asked(*map(world.update, devices))

    @property
    def last_sum(self) -> bytes:
        return self.answers[-1][1]


@contextmanager
def serving(url: str, tls: Tls | None = None) -> Iterator[Server]:
    server = Server(url, tls)
    server.start()
    try:
        yield server
    finally:
        server.link.disconnect(flush_s=0.0)


def invitation(url: str, folder: Path, **credentials: Any) -> Path:
    made = Invitation(
        federation=FEDERATION, device=NAME, broker=url, aggregator_key=SERVER.public.hex(), code=CODE, role=HELPER,
        **credentials,
    )  # fmt: skip
    path = folder / f"{NAME}.toml"
    path.write_text(made.dumps())
    path.chmod(0o600)
    return path


def helper(*arguments: object, point: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ternbus", "helper", *map(str, arguments)]
    environment = {**os.environ, VARIABLE: point}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and what it printed."""
    with process:
        out, err = process.communicate(timeout=WITHIN_S)
    return process.returncode, out + err


def status_of(folder: Path) -> dict[str, Any]:
    code, text = ended(helper("status", folder, "--json"))
    assert code == 0, text
    found: dict[str, Any] = json.loads(text)
    return found
