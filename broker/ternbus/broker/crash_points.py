"""The places between two actions at which a test kills this process. They are absent from normal runs.

``TERNBUS_CRASH_AT=NAME`` arms one of them: the process sends itself SIGKILL when it gets there, with ``NAME:3`` when it
gets there for the third time. Without the variable each call is a call of an empty function.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Final, Literal, get_args

from ternbus.broker.exit_codes import EXIT_CONFIG

VARIABLE: Final = "TERNBUS_CRASH_AT"

# Named by what comes next (`save`, `publish-head`), or by what was just done (`body-written`).
Point = Literal[
    # what all shells do
    "save", "saved", "connect", "subscribe", "publish-status", "acknowledge", "stop",
    # what the aggregator's shell does
    "republish", "publish-head", "publish-delta", "publish-snapshot", "publish-receipt", "publish-grant",
    "publish-terms", "publish-ask", "publish-view", "publish-candidate",
    # what the device's shell does
    "publish-enroll", "publish-offer", "publish-update", "publish-metrics", "publish-statistics", "start-job",
    "job-done", "save-personal",
    "disconnected",
    # what the helper's shell does
    "publish-card", "publish-answer",
    # within the aggregator's save, and beside it
    "body-written", "bodies-synced", "segment-begun", "vectors-piece-written", "vectors-written", "log-moved",
    "file-removed",
    # within the device's save, and the helper's
    "state-written",
    # a file that is replaced: key, settings, personal model
    "file-written", "file-synced", "file-renamed",
    # a store of an older format
    "format-copied", "format-changed", "format-committed",
    # a damaged outbox that is replaced
    "outbox-moved-aside", "outbox-salvaged",
    # a device's folder: joined, then its code is removed; its key replaced, and the folder of the rotation removed
    "joined", "rotation-saved", "rotation-copied", "rotation-settings-written", "folder-renamed",
    # commands that keep a folder: rows that go to an archive, a backup's name, a state that is replaced by another one
    "archive-written", "rows-removed", "backup-checked", "backup-renamed",
    "moved-aside", "coming", "ledger-coming", "ledger-moved",
    # commands beside a running aggregator
    "invited", "requested",
]  # fmt: skip
POINTS: Final[tuple[str, ...]] = get_args(Point)


class _Armed:
    """One point, and how often it has to be reached."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"([a-z-]+)(?::([1-9][0-9]{0,8}))?", text)
        if found is None or found[1] not in POINTS:
            sys.stderr.write(
                f"ternbus: {VARIABLE}={text!r} is not a crash point; "
                f"use NAME or NAME:COUNT with one of: {', '.join(POINTS)}\n"
            )
            sys.exit(EXIT_CONFIG)  # this is imported before any command is there to say it
        self._name, self._left = found[1], int(found[2] or 1)

    def reached(self, point: str) -> None:
        if point != self._name:
            return
        self._left -= 1
        if not self._left:
            os.write(2, f"killed at the crash point {point}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def publishing(self, topic: str) -> None:
        """The point ``publish-KIND`` of a publication under this topic."""
        levels = topic.split("/")
        if levels[0] != "ternbus" or levels[3] == "view":
            self.reached("publish-view")
        else:
            self.reached(f"publish-{levels[4] if levels[3] == 'all' else levels[5]}")


def _nothing(_: str) -> None:
    """What a point is in a normal run."""


_armed: Final = _Armed(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
reached: Final[Callable[[Point], None]] = _nothing if _armed is None else _armed.reached
publishing: Final[Callable[[str], None]] = _nothing if _armed is None else _armed.publishing
