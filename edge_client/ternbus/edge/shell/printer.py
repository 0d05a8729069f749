"""A device's output: one line per event, as text or as JSON."""

import json
import os
import sys
import time
from typing import IO

from ternbus.edge.core.actions import Log, Stop


class Printer:
    """Prints and flushes each line to `output`, by default standard output, so that a pipe delivers it at once."""

    def __init__(self, *, as_json: bool, output: IO[str] | None = None) -> None:
        self._as_json = as_json
        self._output = output

    def __call__(self, log: Log) -> None:
        if self._as_json:
            line = json.dumps({"time": round(time.time(), 3), "event": log.event, "text": log.text, **log.fields})
        else:
            line = f"{time.strftime('%H:%M:%S')}  {log.text}"
        try:
            output = self._output or sys.stdout
            output.write(line + "\n")
            output.flush()
        except BrokenPipeError:
            raise
        except OSError:  # a log on a full disk: the line is lost, the device goes on
            return

    def end(self, stop: Stop) -> None:
        """Print the last line: why the device stops."""
        if self._as_json or stop.code == 0:
            fields = {"code": stop.code, "reason": stop.reason}
            self(Log(event="stopped", text=f"stopped: {stop.reason}", fields=fields))
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
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else value
