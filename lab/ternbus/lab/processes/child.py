"""One process of the testbed as its parent sees it: how it is started, watched, killed, and where its log is.

Each is a session of its own, so that a Ctrl-C of the terminal reaches only the lab, and is tethered to the lab, so
that nothing is left behind even where the lab itself is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ternbus.broker.server import parent_death

# The processes share the machine's cores; were each to use all of them, they would only wait for one another.
ONE_THREAD: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
COMPLAINT: Final = "ternbus: "
POLL_S: Final = 0.05
KILLED_WAIT_S: Final = 5.0

ReadApart = Callable[[str], Iterable[int]]
"""From what a process printed, the ids of those that it started in sessions of their own."""


class Child:
    """A process by the name under which its log is kept; it may be started again after it ended."""

    def __init__(
        self, name: str, log: Path, module: str, arguments: Sequence[str], *, apart: ReadApart = lambda _: ()
    ) -> None:
        self.name = name
        self.log = log
        self.module = module
        self.arguments = tuple(arguments)
        self._apart = apart
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it; everything that it prints goes to the end of its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                # -P: a folder called `broker` or `lab` where the user happens to stand is not ours
                parent_death.command([sys.executable, "-P", "-m", self.module, *self.arguments]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """Its exit code (minus the signal's number if one killed it), and None while it runs or was never started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """SIGTERM to the process, which ends its own children itself."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the process and to all that it started; returns when they are gone."""
        if self._process is None:
            return
        if self.running:  # else it has waited for them, and the ids may be somebody else's by now
            for process in self._apart(self.output()):
                _signal(os.kill, process, signal.SIGKILL)
        group = self._process.pid
        _signal(os.killpg, group, signal.SIGKILL)
        self._process.wait(KILLED_WAIT_S)
        deadline = time.monotonic() + KILLED_WAIT_S
        while _signal(os.killpg, group, signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def output(self) -> str:
        """What it printed since it was last started."""
        with suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")
        return ""

    def complaint(self) -> str:
        """What it printed last in a line that begins with `ternbus:`, as commands say what is wrong; else empty."""
        lines = (line for line in reversed(self.output().splitlines()) if line.startswith(COMPLAINT))
        return next(lines, "").removeprefix(COMPLAINT)

    def last_lines(self, count: int = 20) -> list[str]:
        return self.output().splitlines()[-count:]


def stop(children: Iterable[Child], *, grace_s: float) -> None:
    """SIGTERM to all at once, SIGKILL to those that are still there after the grace; returns when all are gone."""
    stopping = list(children)
    for child in stopping:
        child.terminate()
    deadline = time.monotonic() + grace_s
    while any(child.running for child in stopping) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for child in stopping:
        child.kill()


def _environment() -> dict[str, str]:
    return {**os.environ, **ONE_THREAD, "PYTHONUNBUFFERED": "1"}


def _signal(send: Callable[[int, int], None], target: int, number: int) -> bool:
    """Whether anyone was there to get it."""
    try:
        send(target, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        return False
    return True
