"""What a device tells people and programs: a line an event, as text or as JSON."""

import json
import os
import sys
import time

from ternbus.edge.core.actions import Log, Stop


class Printer:
    """Prints as things happen; the reader of a pipe sees each line at once."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def __call__(self, log: Log) -> None:
        if self._as_json:
            line = json.dumps({"time": round(time.time(), 3), "event": log.event, "text": log.text, **log.fields})
        else:
            line = f"{time.strftime('%H:%M:%S')}  {log.text}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def end(self, stop: Stop) -> None:
        """The last line."""
        if self._as_json or stop.code == 0:
            fields = {"code": stop.code, "reason": stop.reason}
            self(Log(event="stopped", text=f"stopped: {stop.reason}", fields=fields))
        if stop.code != 0:
            sys.stderr.write(f"ternbus: {stop.reason}\n")

    def finish(self, stop: Stop, *, ended: bool) -> int:
        """The last line, and the exit code; the end itself, if a training thread will not `ended`."""
        self.end(stop)
        if not ended:
            # All is saved and said, but a thread is deep in somebody's training code: Python would crash in it or wait.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code)
        return stop.code
