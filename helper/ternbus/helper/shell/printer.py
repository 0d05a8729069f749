"""A helper's output: one line per event, as text or as JSON."""

import json
import sys
import time
from contextlib import suppress

from ternbus.helper.core.actions import Log, Stop


class Printer:
    """Prints and flushes each line to standard output, so that a pipe delivers it at once."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def __call__(self, log: Log) -> None:
        if self._as_json:
            line = json.dumps({"time": round(time.time(), 3), "event": log.event, "text": log.text, **log.fields})
        else:
            line = f"{time.strftime('%H:%M:%S')}  {log.text}"
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # a log on a full disk: the line is lost, the helper goes on
            return

    def finish(self, stop: Stop) -> int:
        """Print the last line, why the helper stops, and return the exit code."""
        if self._as_json or stop.code == 0:
            fields = {"code": stop.code, "reason": stop.reason}
            self(Log(event="stopped", text=f"stopped: {stop.reason}", fields=fields))
        if stop.code != 0:
            with suppress(OSError):  # standard error, too, may be a file on a full disk
                sys.stderr.write(f"ternbus: {stop.reason}\n")
        return stop.code
