"""The log lines of a service: for people, for a system's journal, or as JSON."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import IO, Any, Final, Protocol

from ternbus.broker.log_levels import ERROR, INFO, PRIORITIES, WARNING
from ternbus.broker.printable import printable

JOURNAL: Final = "JOURNAL_STREAM"  # set by systemd for services: device and inode of the stream to its journal


def is_journal(stream: IO[str]) -> bool:
    """Whether what is written there becomes lines of systemd's journal (systemd.exec(5), `$JOURNAL_STREAM`)."""
    journal = os.environ.get(JOURNAL)
    if journal is None:
        return False
    try:
        about = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file, or a closed one
        return False
    return journal == f"{about.st_dev}:{about.st_ino}"


def log_line(
    text: str, *, level: str, event: str, fields: Mapping[str, object], as_json: bool = False, journal: bool = False
) -> str:
    """One line, without its end: the local time with its offset from UTC, the level and the text.

    In a journal, which has a time of its own, the priority in `<>` stands in front (sd-daemon(3)). A peer may have a
    part in the text: what is not printable is replaced, but for the ends of lines of a traceback.
    """
    if as_json:
        about: dict[str, Any] = {"time": round(time.time(), 3), "level": level, "event": event, "text": text}
        return json.dumps({**about, **fields})
    shown = printable(text, keep="\n")
    if journal:
        return f"<{PRIORITIES[level]}>{shown}"
    return f"{_local_time(int(time.time()))} {level:7} {shown}"


@lru_cache(maxsize=1)  # the system is asked for its time zone once a second, not once a line
def _local_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat()


class WriteLog(Protocol):
    """Writes a line of the log."""

    def __call__(
        self, text: str, /, *, level: str = INFO, event: str = "note", fields: Mapping[str, object] | None = None
    ) -> None: ...


class LogOutput:
    """Writes and flushes each line, so that a pipe delivers it at once."""

    def __init__(self, *, as_json: bool = False, stream: IO[str] | None = None, needs_reader: bool = False) -> None:
        """``stream`` is standard error by default."""
        self._as_json = as_json
        self._stream = stream
        self._needs_reader = needs_reader

    def __call__(
        self, text: str, /, *, level: str = INFO, event: str = "note", fields: Mapping[str, object] | None = None
    ) -> None:
        """Write a line. On a full disk it is lost, and the service goes on.

        BrokenPipeError if its reader has ended and the service ``needs_reader``.
        """
        stream = self._stream or sys.stderr
        line = log_line(
            text, level=level, event=event, fields=fields or {}, as_json=self._as_json, journal=is_journal(stream)
        )
        try:
            stream.write(line + "\n")
            stream.flush()
        except BrokenPipeError:
            if self._needs_reader:
                raise
        except OSError:
            return


_FORMATTER: Final = logging.Formatter()


class _Handler(logging.Handler):
    """Hands the lines of Python's logging on."""

    def __init__(self, write: WriteLog) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        level = ERROR if record.levelno >= logging.ERROR else WARNING if record.levelno >= logging.WARNING else INFO
        text = record.getMessage()
        if record.exc_info:
            text = f"{text.rstrip()}\n{_FORMATTER.formatException(record.exc_info)}"
        self._write(text, level=level, event=record.name.rpartition(".")[2])


def take_library_lines(write: WriteLog) -> None:
    """Have what modules and libraries log by Python's logging written as lines of the service."""
    logging.basicConfig(handlers=[_Handler(write)])
