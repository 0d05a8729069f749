"""A helper's output: one line per event, as text or as JSON."""

import sys
from contextlib import suppress
from typing import Final

from ternbus.broker.log_levels import ERROR, INFO, WARNING
from ternbus.broker.log_output import LogOutput
from ternbus.helper.core.actions import Log, Stop

STOPPED: Final = "stopped"
WARNINGS: Final = frozenset({"contested", "disconnected", "refused"})  # events that the operator may have to mend


class Printer:
    """Prints and flushes each line to standard output, so that a pipe delivers it at once."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def __call__(self, log: Log) -> None:
        level = WARNING if log.event in WARNINGS else INFO
        level = ERROR if log.event == STOPPED and log.fields.get("code") else level
        write = LogOutput(as_json=self._as_json, stream=sys.stdout, needs_reader=True)
        write(log.text, level=level, event=log.event, fields=log.fields)

    def finish(self, stop: Stop) -> int:
        """Print the last line, why the helper stops, and return the exit code."""
        if self._as_json or stop.code == 0:
            fields = {"code": stop.code, "reason": stop.reason}
            self(Log(event=STOPPED, text=f"stopped: {stop.reason}", fields=fields))
        if stop.code != 0:
            with suppress(OSError):  # standard error, too, may be a file on a full disk
                sys.stderr.write(f"ternbus: {stop.reason}\n")
        return stop.code
