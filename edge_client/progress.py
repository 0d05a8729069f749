"""What a device tells people and programs: a line an event, as text or as JSON."""

import json
import time

import typer

from edge_client.actions import Log, Stop


class Printer:
    """Prints as things happen; the reader of a pipe sees each line at once."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def __call__(self, log: Log) -> None:
        if self._as_json:
            line = json.dumps({"time": round(time.time(), 3), "event": log.event, "text": log.text, **log.fields})
        else:
            line = f"{time.strftime('%H:%M:%S')}  {log.text}"
        typer.echo(line)

    def end(self, stop: Stop) -> None:
        """The last line."""
        if self._as_json or stop.code == 0:
            self(
                Log(event="stopped", text=f"stopped: {stop.reason}", fields={"code": stop.code, "reason": stop.reason})
            )
        if stop.code != 0:
            typer.echo(f"ternbus: {stop.reason}", err=True)
