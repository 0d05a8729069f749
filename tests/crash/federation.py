"""The federation: a broker, an aggregator and two devices as processes, each of which may end in ways that were chosen.

Whatever ends when, its versions are the same bits: each is made of one update of both devices, whose sum does not
depend on their order, and a training repeated on the same version is the same training.
"""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Self

from ternbus.aggregator.shell import administration
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.crash_points import VARIABLE
from ternbus.broker.server import running
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell.options import Options
from ternbus.lab.processes.child import Child, stop

HERE: Final = Path(__file__).parent
TASK: Final = f"{HERE / 'wide_digits'}:TASK"
WITHIN_S: Final = 120.0  # ends a wait for what never comes; what comes takes a moment
GRACE_S: Final = 30.0
LOOK_S: Final = 0.01
DEVICES: Final = ("d0", "d1")
AGGREGATOR: Final = "aggregator"
JOIN: Final = {
    # in small frames, its update has so many parts that it is offered first; it evaluates too
    "d0": ("--partition", "iid:0/8", "--hold-out", "0.2", "--frame-bytes", "4096"),
    "d1": ("--partition", "iid:1/8"),
}
RUN: Final = {"d0": Options(reports=True, fine_tune=0.5)}
SETTINGS: Final = {
    "merge.buffer_size": len(DEVICES),
    "home_assistant.discovery_prefix": "homeassistant",
    "home_assistant.every_s": 1.0,
    "merge.min_devices": len(DEVICES),  # a version of one device's update alone would be another version
    "downlink.slots": 4,  # a snapshot every second version
    "downlink.min_interval_s": 0.05,
    "limits.direct_parts": 4,
    "limits.frame_bytes": 2_000_000,
    "plan.clip_sigma": 0.5,  # few trits are 0: so d0's updates have more parts than this model's come unasked
    "plan.local_steps": 3,
}

FAILED: Final = (1,)
POINT, DISK, OUTSIDE = "point", "disk", "outside"
KINDS: Final = ("full", "broken", "unsynced", "torn")


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a process is to end: at a crash point, by a failing disk, or killed from outside after some time."""

    how: str
    what: str = ""  # NAME:COUNT of the point, or KIND:COUNT of the failure
    after_s: float | None = None  # kill it then at the latest

    def environment(self, folder: Path, preload: Path | None) -> dict[str, str]:
        if self.how == POINT:
            return {VARIABLE: self.what}
        if self.how == DISK:
            return {"LD_PRELOAD": str(preload), "FAILING_DISK": f"{self.what}:{folder}"}
        return {}

    def check(self, code: int, output: str) -> str:
        """What ended the process. AssertionError if it ended in any other way than this."""
        if self.how == POINT:
            name = self.what.partition(":")[0]
            assert code == -signal.SIGKILL, (self, code, output)
            # another thread may still write a line before the process is gone
            assert f"killed at the crash point {name}\n" in output, (self, output)
            return name
        assert self.how == DISK, (self, code, output)
        kind = self.what.partition(":")[0]
        if kind == "torn":
            assert code == -signal.SIGKILL, (self, code, output)
        else:  # a restart helps: neither a mistake of the operator nor a refusal
            assert code in FAILED, (self, code, output)
            assert re.search(r"disk I/O error|database or disk is full|No space left|Input/output error", output), (
                output
            )
        return kind


def at(point: str, count: int = 1, *, after_s: float | None = None) -> End:
    return End(how=POINT, what=f"{point}:{count}", after_s=after_s)


def failing(kind: str, count: int, *, after_s: float | None = None) -> End:
    return End(how=DISK, what=f"{kind}:{count}", after_s=after_s)


@dataclass(slots=True)
class Lives:
    """A process that is started again and again, and the ends that it is still to have."""

    child: Child
    folder: Path
    ends: deque[End] = field(default_factory=deque)
    draw: Callable[[], End] | None = None  # makes one where none is planned
    now: End | None = None  # the end that it is to have this time
    started: float = 0.0
    wanted: bool = False  # it is to run
    done: bool = False  # it ended by itself with exit code 0

    def is_over(self, now: float) -> bool:
        """Whether it has lived for the time that it had."""
        return self.now is not None and self.now.after_s is not None and now - self.started >= self.now.after_s

    def next_end(self) -> End | None:
        if self.ends:
            return self.ends.popleft()
        return None if self.draw is None else self.draw()


class Federation:
    """One run in a folder of its own; the end of the `with` block ends every process."""

    devices: ClassVar[Sequence[str]] = DEVICES

    def __init__(self, folder: Path, engine: running.Engine, preload: Path | None = None) -> None:
        self.folder = folder
        self.preload = preload
        self.home = folder / AGGREGATOR
        self.ended: Counter[tuple[str, str]] = Counter()  # by process and what ended it
        self._software = running.choose(engine)
        self._broker = running.start(self._software, host="127.0.0.1", port=0, directory=folder / "broker")
        self._lives: dict[str, Lives] = {}
        try:
            self.create()
        except BaseException:
            self._broker.stop()
            raise

    def create(self) -> None:
        """Make the aggregator."""
        self.make_aggregator(SETTINGS)

    def make_aggregator(self, settings: Mapping[str, object]) -> None:
        model = load_task(TASK).initial(1)
        administration.create(self.home, federation="lab", broker=self.broker, model=model, settings=settings)

    @property
    def broker(self) -> str:
        """Its URL."""
        return self._broker.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop([lives.child for lives in self._lives.values()], grace_s=0.0)
        self._broker.stop()

    def device(self, name: str) -> Path:
        return self.folder / name

    def options(self, name: str) -> Sequence[str]:
        """Of a device's `join`."""
        return JOIN.get(name, ())

    def process(self, name: str) -> tuple[str, list[str]]:
        """The module that a process runs, and its arguments."""
        if name == AGGREGATOR:
            return "ternbus", ["aggregator", "run", str(self.home)]
        # what `ternbus edge run` replaces itself by
        request = {"folder": str(self.device(name)), "role": "train", "as_json": False}
        return "ternbus.edge.shell.process", [json.dumps({**request, "options": asdict(self.run_options(name))})]

    def run_options(self, name: str) -> Options:
        return RUN.get(name, Options())

    # --- processes that go on

    def start(self, *names: str) -> None:
        for name in names:
            lives = self._of(name)
            lives.wanted = True
            self._begin(lives)

    def join(self, *names: str, ends: Mapping[str, Sequence[End]] | None = None) -> None:
        """Have devices join, meanwhile with these ends."""
        joining = {name: f"join of {name}" for name in names}
        for name, called in joining.items():
            where = self.folder / "invitations" / f"{name}.toml", self.device(name)
            command = "edge", "join", *where, "--task", TASK, "--seed", "1", *self.options(name)
            self._add(called, self.device(name), "ternbus", [str(each) for each in command])
            self.plan(called, *(ends or {}).get(name, ()))
        self.start(*joining.values())
        self.until(lambda: all(self._lives[called].done for called in joining.values()), "end of the joins")
        for called in joining.values():
            del self._lives[called]

    def plan(self, name: str, *ends: End) -> None:
        """These ends are the next that a process has, from its next start on."""
        self._of(name).ends += ends

    def draw(self, name: str, draw: Callable[[], End]) -> None:
        """Each end that a process has from now on is drawn, until ``calm``."""
        self._of(name).draw = draw

    def calm(self) -> None:
        """Whatever runs is killed for the last time."""
        for name, lives in self._lives.items():
            lives.draw = None
            self.kill(name)

    def end(self, *names: str) -> None:
        """Have processes end orderly, as the operator does, after they have found the broker."""
        self.until(lambda: all("connected" in self.said(name) for name in names), "connection")
        for name in names:
            self._lives[name].wanted = False
        stop([self._lives[name].child for name in names], grace_s=GRACE_S)
        for name in names:
            assert self._lives[name].child.ended() == 0, self._lives[name].child.output()

    def interrupt(self, name: str) -> None:
        self._lives[name].child.terminate()

    def said(self, name: str) -> str:
        """What a process has printed since its last start."""
        return self._lives[name].child.output()

    def kill(self, name: str) -> None:
        lives = self._lives[name]
        lives.child.kill()
        self.ended[name, OUTSIDE] += 1
        self._begin(lives)

    def kill_broker(self) -> None:
        """Kill the broker, and start it again at the same address."""
        broker = self._broker
        broker.process.kill()
        broker.process.wait()
        self.ended["broker", OUTSIDE] += 1
        endpoint = broker.endpoint
        directory = broker.directory
        self._broker = running.start(self._software, host=endpoint.host, port=endpoint.port, directory=directory)

    def until_later(self, versions: int) -> None:
        """Until so many versions more are made."""
        wanted = self.version() + versions
        self.until(lambda: self.version() >= wanted, f"version {wanted}")

    def until(self, done: Callable[[], object], what: str, within_s: float = WITHIN_S) -> None:
        """Start again what has ended, until something holds."""
        deadline = time.monotonic() + within_s
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {within_s:.0f} s\n{self.story()}")
            self.look()
            time.sleep(LOOK_S)

    def look(self) -> None:
        """Start again what has ended, and kill what has lived long enough."""
        for name, lives in self._lives.items():
            if not lives.wanted or lives.done:
                continue
            code = lives.child.ended()
            if code is None:
                if lives.is_over(time.monotonic()):
                    self.kill(name)
                continue
            lives.child.kill()  # what it left behind
            if code == 0:
                lives.done = True
                continue
            assert lives.now is not None, f"{name} ended with code {code}\n{self.story()}"
            self.ended[name, lives.now.check(code, lives.child.output())] += 1
            self._begin(lives)

    def left(self) -> int:
        """How many planned ends are still to come."""
        return sum(len(lives.ends) + (lives.now is not None) for lives in self._lives.values() if lives.wanted)

    def all_done(self, *names: str) -> bool:
        return all(self._lives[name].done for name in names)

    def story(self) -> str:
        """What each process is to do, and the last that it said."""
        told = []
        for name, lives in self._lives.items():
            told += [f"--- {name}: {lives.now}, then {list(lives.ends)[:3]}", *lives.child.last_lines(8)]
        return "\n".join(told)

    # --- commands

    def command(self, name: str, *arguments: object, ends: Sequence[End] = ()) -> str:
        """Run a command with each of these ends, then to its success; what it printed at last."""
        for end in ends:
            self.attempt(name, end, *arguments)
        return self.attempt(name, None, *arguments)

    def attempt(self, name: str, end: End | None, *arguments: object) -> str:
        """Run a command that is to end so, or with success; what it printed."""
        environment = {} if end is None else end.environment(self.device(name), self.preload)
        with subprocess.Popen(
            [sys.executable, "-m", "ternbus", *map(str, arguments)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            output = self._output(process)
        if end is None:
            assert process.returncode == 0, output
        else:
            self.ended[name, end.check(process.returncode, output)] += 1
        return output

    def _output(self, process: "subprocess.Popen[str]") -> str:
        """What a command printed, while the others are looked after."""
        try:
            self.until(lambda: process.poll() is not None, "end of a command")
        finally:
            if process.poll() is None:
                process.kill()
        assert process.stdout is not None
        return process.stdout.read()

    def _of(self, name: str) -> Lives:
        if name not in self._lives:
            self._add(name, self.home if name == AGGREGATOR else self.device(name), *self.process(name))
        return self._lives[name]

    def _add(self, name: str, folder: Path, module: str, arguments: Sequence[str]) -> None:
        self._lives[name] = Lives(Child(name, self.folder / "logs" / f"{name}.log", module, arguments), folder)

    def _begin(self, lives: Lives) -> None:
        lives.now = lives.next_end()
        lives.done, lives.started = False, time.monotonic()
        lives.child.start({} if lives.now is None else lives.now.environment(lives.folder, self.preload))

    def version(self) -> int:
        """The newest one."""
        with closing(sqlite3.connect(self.home / LEDGER, timeout=30.0)) as db:
            ((version,),) = db.execute("SELECT max(version) FROM versions").fetchall()
        return int(version)


def preload_in(folder: Path, compiler: str) -> Path:
    """Compile the disk that fails, which a process preloads; its path."""
    preload = folder / "failing_disk.so"
    source = HERE / "failing_disk.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", preload, source, "-ldl"], check=True)
    return preload


def as_json(*arguments: object) -> dict[str, object]:
    """What a command of `ternbus` prints with --json, even if it found faults."""
    words = [sys.executable, "-m", "ternbus", *map(str, arguments), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@contextmanager
def joined(folder: Path, engine: running.Engine, preload: Path | None = None) -> Iterator[Federation]:
    """A federation whose aggregator and devices run, and to which nothing has happened."""
    with Federation(folder, engine, preload) as federation:
        federation.start(AGGREGATOR)
        federation.command(
            AGGREGATOR, "aggregator", "invite", federation.home, *DEVICES, "--out", folder / "invitations"
        )
        federation.join(*DEVICES)
        federation.start(*DEVICES)
        yield federation
