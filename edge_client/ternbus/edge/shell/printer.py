"""A device's output: one line per event, as text or as JSON."""

import os
import sys
from typing import IO, Final

from ternbus.broker.log_levels import ERROR, INFO, WARNING
from ternbus.broker.log_output import LogOutput
from ternbus.edge.core.actions import Log, Stop

STOPPED: Final = "stopped"
WARNINGS: Final = frozenset({  # events that the owner may have to do something about
    "bad-plan", "cloned", "contested", "disconnected", "evaluation-failed", "fine-tuning-failed", "invalid",
    "refused", "revoked", "snapshot-failed", "stale", "training-failed", "unknown",
})  # fmt: skip


class Printer:
    """Prints and flushes each line to `output`, by default standard output, so that a pipe delivers it at once."""

    def __init__(self, *, as_json: bool, output: IO[str] | None = None) -> None:
        self._as_json = as_json
        self._output = output

    def __call__(self, log: Log) -> None:
        level = WARNING if log.event in WARNINGS else INFO
        level = ERROR if log.event == STOPPED and log.fields.get("code") else level
        write = LogOutput(as_json=self._as_json, stream=self._output or sys.stdout, needs_reader=True)
        write(log.text, level=level, event=log.event, fields=log.fields)

    def end(self, stop: Stop) -> None:
        """Print the last line: why the device stops."""
        if self._as_json or stop.code == 0:
            fields = {"code": stop.code, "reason": stop.reason}
            self(Log(event=STOPPED, text=f"stopped: {stop.reason}", fields=fields))
        if stop.code != 0:
            sys.stderr.write(f"ternbus: {stop.reason}\n")

    def finish(self, stop: Stop, *, ended: bool) -> int:
        """Print the last line and return the exit code; end the process here if the training thread has not `ended`."""
        self.end(stop)
        if not ended:
            # All is saved and printed, but a thread still runs the task's code: Python would wait or crash in it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code)
        return stop.code


def shown(value: object) -> object:
    """A value in a table for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else value
