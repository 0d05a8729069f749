"""The supervisor of the testbed's processes: it restarts killed processes and detects failed ones."""

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.exit_codes import EXIT_BUDGET, EXIT_CONFIG, EXIT_DONE, EXIT_REFUSED
from ternbus.lab.processes.child import Child, stop

RESTART_AFTER_S: Final = 1.0
RESTARTS_MAX: Final = 5  # of one process, in addition to the scenario's faults
FOR_GOOD: Final = {EXIT_CONFIG, EXIT_REFUSED}  # a restart would not help, as the units in deploy/systemd know

Say = Callable[[str], None]


class ChildError(FederationError):
    """A process ended unexpectedly; `lines` are the end of its log."""

    def __init__(self, child: Child, how: str) -> None:
        super().__init__(f"{child.name} {how}")
        self.lines: Sequence[str] = child.last_lines()
        self.log = child.log


class Supervisor:
    """All processes of a run, in the order of their start. Call `check` often."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._children: dict[str, Child] = {}
        self._start_again: dict[str, float] = {}
        self._restarts: dict[str, int] = {}
        self._may_end: set[str] = set()
        self._may_fail: set[str] = set()
        self._mistaken: set[str] = set()  # processes with a mistake in their configuration
        self.lost: dict[str, str] = {}  # why each process that may fail has failed for good

    def start(self, child: Child) -> None:
        self._children[child.name] = child  # before the start, so that `stop_all` always includes it
        child.start()

    def check(self) -> None:
        """Start killed processes that are due; raise `ChildError` for a process that ended unexpectedly.

        A device may end if its privacy budget is spent. If a process reports a configuration error, raise
        `ConfigError`. A process that may fail is started again as after a kill, and is `lost` if that does not help; a
        configuration error is raised if all of these report one.
        """
        now = time.monotonic()
        for name, child in self._children.items():
            if name in self._start_again:
                self._start_if_due(child, now)
            elif (code := child.ended()) is not None and name not in self.lost and not self._may_have(name, code):
                self._ended(child, code, now)

    def kill(self, name: str, *, restart_after_s: float) -> None:
        """Send SIGKILL, like a power cut, and schedule the restart after ``restart_after_s``."""
        self._say(f"killing {name} (SIGKILL); restart in {restart_after_s:g} s")
        self._children[name].kill()
        self._start_again[name] = time.monotonic() + restart_after_s

    @property
    def recovering(self) -> bool:
        """Whether a process waits for its restart."""
        return bool(self._start_again)

    def may_end(self, names: Iterable[str]) -> None:
        """Allow these processes to end with exit code 0 from now on."""
        self._may_end |= set(names)

    def may_fail(self, names: Iterable[str]) -> None:
        """Let the run go on without these processes if they fail."""
        self._may_fail |= set(names)

    def running(self, names: Iterable[str]) -> bool:
        """Whether any of these processes runs or waits for its restart."""
        return any(name in self._start_again or self._children[name].running for name in names)

    def stop(self, names: Iterable[str], *, grace_s: float) -> None:
        stopping = [self._children[name] for name in names if name in self._children]
        self._may_end |= {child.name for child in stopping}
        for child in stopping:
            self._start_again.pop(child.name, None)
        stop(stopping, grace_s=grace_s)
        for child in stopping:
            del self._children[child.name]

    def stop_all(self, *, grace_s: float) -> None:
        self.stop(list(self._children), grace_s=grace_s)

    def _may_have(self, name: str, code: int) -> bool:
        return code == EXIT_BUDGET or (code == EXIT_DONE and name in self._may_end)

    def _start_if_due(self, child: Child, now: float) -> None:
        if now >= self._start_again[child.name]:
            del self._start_again[child.name]
            child.start()
            self._say(f"{child.name} was restarted")

    def _ended(self, child: Child, code: int, now: float) -> None:
        child.kill()  # its own children may still run
        complaint, may_fail = child.complaint(), child.name in self._may_fail
        if code == EXIT_CONFIG and complaint:
            self._mistaken.add(child.name)
            if not may_fail or self._mistaken >= self._may_fail:
                raise ConfigError(f"{child.name}: {complaint}")
        how = f"ended with exit code {code}" if code >= 0 else f"was terminated by {signal.Signals(-code).name}"
        killed = code == -signal.SIGKILL
        if not killed and not may_fail:
            raise ChildError(child, how)
        how = "was killed (SIGKILL)" if killed else f"{how}: {complaint}" if complaint else how
        self._restarts[child.name] = self._restarts.get(child.name, 0) + 1
        if self._restarts[child.name] <= RESTARTS_MAX and code not in FOR_GOOD:
            self._say(f"{child.name} {how}; restart in {RESTART_AFTER_S:g} s")
            self._start_again[child.name] = now + RESTART_AFTER_S
        elif may_fail:
            self._say(f"{child.name} {how}; the run goes on without it")
            self.lost[child.name] = complaint or f"it {how}, see {child.log}"
        else:
            raise ChildError(child, f"was killed {self._restarts[child.name]} times, perhaps out of memory")
