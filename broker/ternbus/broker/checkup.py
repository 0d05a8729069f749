"""What `ternbus doctor` finds: results as values, and the checks that every directory of Ternbus needs."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from ternbus.broker.files import closing, is_exposed, is_read_only
from ternbus.broker.path_errors import WRITABLE_AGAIN
from ternbus.broker.version import software

LOW_BELOW: Final = 0.10  # parts of a file system that are free
FULL_BELOW: Final = 0.05
PYTHON: Final = (3, 11)
BUILT_S: Final = 1_767_225_600.0  # 2026-01-01: no clock that is right is before
AHEAD_S: Final = 60.0  # that a file may be newer than the clock
TIMESYNC: Final = Path("/run/systemd/timesync")  # of systemd-timesyncd; `synchronized` in it once the clock is right


class Grade(IntEnum):
    """How a check ended; the worst grade is the exit code of `ternbus doctor`."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check: what was looked at, what was found, and what to do about it."""

    grade: Grade
    check: str
    text: str
    mend: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "grade": self.grade.name.lower()}


def ok(check: str, text: str) -> Result:
    return Result(grade=Grade.OK, check=check, text=text)


def warning(check: str, text: str, mend: str) -> Result:
    return Result(grade=Grade.WARNING, check=check, text=text, mend=mend)


def error(check: str, text: str, mend: str = "") -> Result:
    return Result(grade=Grade.ERROR, check=check, text=text, mend=mend)


def failed(check: str, text: str) -> Result:
    """The result for an error's text, of which the part after the last `; ` or `: ` says what to do."""
    what, _, mend = text.partition("; ")
    return error(check, what, mend)


def machine() -> Iterator[Result]:
    """The versions of what runs here, and the clock."""
    text = f"{software()}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON:
        yield error("version", text, "install Python 3.11 or later")
    else:
        yield ok("version", text)
    yield clock(time.time())


def clock(now: float, timesync: Path = TIMESYNC) -> Result:
    """Whether the clock can be right; invitations and certificates end by it."""
    shown = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    if now < BUILT_S:
        return error("clock", f"the clock says {shown}", "set it, or let NTP: timedatectl set-ntp true")
    if timesync.is_dir() and not (timesync / "synchronized").exists():
        return warning("clock", f"{shown}, not synchronized yet", "check the network, and: timedatectl timesync-status")
    return ok("clock", shown)


def disk(folder: Path) -> Result:
    """How much of the file system is free for this user."""
    try:
        about = os.statvfs(folder)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as problem:
        return error("disk", f"{folder}: {problem.strerror}")
    share = about.f_bavail / about.f_blocks if about.f_blocks else 1.0
    text = f"{share:.1%} of the file system of {folder} is free ({free_bytes / 1e9:.1f} GB)"
    if share < FULL_BELOW:
        return error("disk", text, "free some space: below 5 % an aggregator accepts nothing")
    return warning("disk", text, "free some space") if share < LOW_BELOW else ok("disk", text)


def secrets(paths: Iterable[Path]) -> Iterator[Result]:
    """Whether the files that must be secret are, and can be read; those that are missing are left out."""
    for path in paths:
        if not path.exists():
            continue
        if is_exposed(path):
            yield error("keys", f"other users can read {path}", closing(path))
        elif not os.access(path, os.R_OK):
            yield error("keys", f"{path} cannot be read by this user", "run the command as the owner of the file")
        else:
            yield ok("keys", f"{path} is closed to other users")


def writable(folder: Path) -> Result:
    """Whether this user may write there, and the file system takes it."""
    if is_read_only(folder):  # before permissions, which nobody has then
        return error("folder", f"the file system of {folder} is read-only", WRITABLE_AGAIN)
    if os.access(folder, os.W_OK | os.X_OK):
        return ok("folder", f"{folder} can be written")
    return error("folder", f"{folder} cannot be written by this user", "run the command as the owner of the folder")


def ahead(paths: Iterable[Path], now: float) -> Iterator[Result]:
    """Whether a file is newer than the clock: then the clock has gone back."""
    for path in paths:
        if path.exists() and (by_s := path.stat().st_mtime - now) > AHEAD_S:
            yield warning("clock", f"{path} is {by_s:.0f} s newer than the clock", "set the clock, or let NTP")


def worst(results: Iterable[Result]) -> Grade:
    return max((each.grade for each in results), default=Grade.OK)
