"""A child process of the testbed: start, exit code, output, and termination with its own children.

Each child is a session of its own, so that the terminal's Ctrl-C reaches only the lab. Each child ends with the lab,
even if the lab is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ternbus.broker.server import parent_death

# The processes share the cores of the machine; more threads in each process would slow all of them down.
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
"""A function from a process's output to the ids of child processes that it started in other sessions."""


class Child:
    """A named process with a log; it may be started again after it has ended."""

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

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the process, with these variables beside the lab's own; its output is appended to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                # -P: the current folder may contain modules with the names of ours
                parent_death.command([sys.executable, "-P", "-m", self.module, *self.arguments]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_environment(), **(environment or {})},
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """The exit code, or minus the number of the signal that ended the process; None if it runs or never started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """Send SIGTERM to the process, which then ends its own children."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the process and all its children, and wait until they have ended."""
        if self._process is None:
            return
        if self.running:  # otherwise the ids may already belong to other processes
            for process in self._apart(self.output()):
                _signal(os.kill, process, signal.SIGKILL)
        group = self._process.pid
        _signal(os.killpg, group, signal.SIGKILL)
        self._process.wait(KILLED_WAIT_S)
        deadline = time.monotonic() + KILLED_WAIT_S
        while _signal(os.killpg, group, signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def output(self) -> str:
        """The output since the last start."""
        with suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")
        return ""

    def complaint(self) -> str:
        """The last error message of a `ternbus` command in the output; empty if there is none."""
        lines = (line for line in reversed(self.output().splitlines()) if line.startswith(COMPLAINT))
        return next(lines, "").removeprefix(COMPLAINT)

    def last_lines(self, count: int = 20) -> list[str]:
        return self.output().splitlines()[-count:]


def stop(children: Iterable[Child], *, grace_s: float) -> None:
    """Send SIGTERM to all children, then SIGKILL to those that run after ``grace_s``; wait until all have ended."""
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
    """Send a signal; return False if there was no process to receive it."""
    try:
        send(target, number)
    except (ProcessLookupError, PermissionError):  # macOS raises PermissionError for a group of zombies
        return False
    return True
