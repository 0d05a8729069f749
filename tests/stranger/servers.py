"""Ternbus as black boxes: its broker and its aggregator as processes, seen through their command lines alone."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
ENGINES = ["mosquitto", "nats"]  # `make setup` provides both; without one, its tests fail and say so
COMMAND = [sys.executable, "-m", "ternbus"]


def until(done: Callable[[], object], timeout: float, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def ternbus(*arguments: str | Path) -> str:
    """Run a command to its end; what it printed."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
    return done.stdout


class Broker:
    """`ternbus broker up`."""

    def __init__(self, engine: str, folder: Path) -> None:
        """Start it, and wait for the line that says where it is."""
        self.engine = engine
        self._log = folder.with_suffix(".log").open("w")
        self._process = subprocess.Popen(
            [*COMMAND, "broker", "up", "--engine", engine, "--json", "--port", "0", "--dir", str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(30) else b""
        if not line:
            self.stop()
            raise RuntimeError(f"no broker: {folder.with_suffix('.log').read_text()}")
        self.url: str = json.loads(line)["url"]

    def stop(self) -> None:
        """End it and wait."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Aggregator:
    """`ternbus aggregator …` over one directory."""

    def __init__(
        self, folder: Path, *, federation: str, broker: str | Path, model: Path, settings: dict[str, object]
    ) -> None:
        """Make the federation, on the broker of a URL or of a directory; `start` runs it."""
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        where = "--broker-dir" if isinstance(broker, Path) else "--broker"
        ternbus("aggregator", "init", folder, "--federation", federation, where, broker, "--model", model, *sets)

    def start(self) -> None:
        """Run it; that it serves is seen on the broker."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "aggregator", "run", str(self.folder)], env=ENVIRONMENT, stdout=log, stderr=log
            )

    @property
    def log(self) -> Path:
        """What it said."""
        return self.folder.with_suffix(".log")

    @contextmanager
    def halted(self) -> Iterator[None]:
        """It does nothing during the block, as on a machine that is busy with something else."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def resident_kib(self) -> int:
        """Its resident memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise RuntimeError("no VmRSS")

    def terminate(self) -> int:
        """End it in order; its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(60)

    def invite(self, *devices: str, evaluators: Sequence[str] = ()) -> dict[str, Path]:
        """Invitations by device and evaluator; each call has files of its own."""
        folder = self.folder.with_name(f"{self.folder.name}-invitations-{time.monotonic_ns()}")
        judges = [word for name in evaluators for word in ("--evaluator", name)]
        ternbus("aggregator", "invite", self.folder, *devices, *judges, "--out", folder)
        return {name: folder / f"{name}.toml" for name in (*devices, *evaluators)}

    def status(self) -> dict[str, Any]:
        """What `status --json` says."""
        found: dict[str, Any] = json.loads(ternbus("aggregator", "status", self.folder, "--json"))
        return found

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.alive:
            self.terminate()
