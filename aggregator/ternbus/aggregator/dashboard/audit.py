"""The record of who did what by the dashboard: in the log, in a file of the aggregator's directory, on the page."""

import json
import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.shell.dashboard_token import AUDIT, AUDIT_BEFORE
from ternbus.broker.files import inherit_owner
from ternbus.broker.log_levels import INFO, WARNING
from ternbus.broker.log_output import WriteLog

BYTES_MAX: Final = 1 << 20  # then a new file is begun, and one of before is kept
SHOWN: Final = 100
REFUSED_PER_MINUTE: Final = 6  # lines of the log about logins that were refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One action, or an attempt of one."""

    at: float  # Unix seconds
    who: str  # address and session
    what: str
    about: str  # what it was done to
    result: str
    done: bool


@dataclass(slots=True)
class Audit:
    """Appends to the file; the last records are in memory."""

    path: Path
    log: WriteLog
    last: deque[Record] = field(default_factory=lambda: deque(maxlen=SHOWN))
    _refused: Record | None = None  # the last login that was, and how many there were: they push no action out
    _refused_count: int = 0
    _limit: LogLimit = field(default_factory=lambda: LogLimit(per_minute=REFUSED_PER_MINUTE))

    @classmethod
    def open(cls, directory: Path, log: WriteLog) -> Self:
        """With the last records of the file, where there is one that can be read."""
        found = cls(directory / AUDIT, log)
        with suppress(OSError), found.path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - BYTES_MAX // 4))
            for line in file.read().splitlines()[-SHOWN:]:
                with suppress(ValueError, TypeError):  # the first one may be cut
                    found.last.append(Record(**json.loads(line)))
        return found

    def note(self, who: str, what: str, about: str, result: str, *, done: bool = True) -> None:
        """Write a record. What is done stays done where the disk does not take it: the log has it too."""
        record = Record(at=round(time.time(), 3), who=who, what=what, about=about, result=result, done=done)
        self.last.append(record)
        text = f"dashboard: {who}: {what}{f' {about}' if about else ''}: {result}"
        self.log(text, level=INFO if done else WARNING, event="dashboard-action", fields=asdict(record))
        try:
            self._append(json.dumps(asdict(record)).encode() + b"\n")
        except OSError as error:
            self.log(f"{self.path} was not written: {error.strerror}", level=WARNING, event="dashboard-audit")

    def refused_login(self, who: str, why: str) -> None:
        """Note that somebody does not have the token, without room for many of them: in the log, within its limit."""
        self._refused_count += 1
        result = f"refused, {self._refused_count} times since the dashboard started: {why}"
        self._refused = Record(at=round(time.time(), 3), who=who, what="login", about="", result=result, done=False)
        if line := self._limit.write("login", f"dashboard: {who}: login: {result}", time.monotonic()):
            self.log(line, level=WARNING, event="dashboard-action", fields=asdict(self._refused))

    def records(self) -> list[Record]:
        """The last ones, the newest first."""
        refused = [self._refused] if self._refused is not None else []
        return sorted([*self.last, *refused], key=lambda each: -each.at)

    def _append(self, line: bytes) -> None:
        with suppress(FileNotFoundError):
            if self.path.stat().st_size > BYTES_MAX:
                self.path.replace(self.path.with_name(AUDIT_BEFORE))
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        if is_new:
            inherit_owner(self.path)
