"""The progress of a run: a live table on a terminal, otherwise a line every few seconds."""

import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ternbus.aggregator.store.device_metrics import shown_name, shown_value
from ternbus.lab.report.observation import Device, Observation
from ternbus.lab.report.report import device_table, size, table

LINE_EVERY_S: Final = 2.0
ROWS_MAX: Final = 24


class Progress(Protocol):
    """A display of a run's progress."""

    def say(self, line: str) -> None:
        """Print a line that stays on the screen."""
        ...

    def show(self, moment: Observation, seconds: float) -> None:
        """Show the current state of the federation, ``seconds`` after version 0."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def to(stream: IO[str]) -> Progress:
    """A live table if the stream is a terminal, otherwise lines."""
    console = Console(file=stream)
    return LiveTable(console) if console.is_terminal and not console.is_dumb_terminal else Lines(stream)


class Lines:
    """Progress as lines of text, for logs and pipes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._shown = -1
        self._next = 0.0

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def show(self, moment: Observation, seconds: float) -> None:
        now = time.monotonic()
        if moment.version == self._shown or now < self._next:
            return
        self._shown, self._next = moment.version, now + LINE_EVERY_S
        self.say("  ".join(f"{name} {value}" for name, value in _figures(moment, seconds).items()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LiveTable:
    """Progress as a table with one row for each device, redrawn in place without a thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def show(self, moment: Observation, seconds: float) -> None:
        self._live.update(_screen(moment, seconds), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def closing_table(report: Mapping[str, Any], files: Sequence[str]) -> str:
    """The summary that is printed at the end of a run, with the names of the written files."""
    rows = [*table(report), ("written", files[0]), *(("", file) for file in files[1:])]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*device_table(report, ROWS_MAX), *(f"{name:<{width}}  {value}" for name, value in rows)])


def _figures(moment: Observation, seconds: float) -> dict[str, str]:
    metric = moment.metric or "metric"
    return {
        "version": str(moment.version),
        shown_name(metric): _metric(moment, metric),
        "updates": str(moment.accepted),
        "staleness": "-" if moment.last.staleness is None else f"{moment.last.staleness:.1f}",
        "up": size(moment.bytes_up),
        "down": size(moment.bytes_down),
        "seconds": f"{max(seconds, 0):.0f}",
    }


def _metric(moment: Observation, metric: str) -> str:
    """The newest value, and the best one, by the metric's direction, if that is another."""
    newest, best = moment.newest(metric), moment.best(metric)
    if newest is None or best is None:
        return "-"
    shown, highest = shown_value(newest), shown_value(best.metrics[metric])
    return shown if shown == highest else f"{shown} (best {highest})"


def _screen(moment: Observation, seconds: float) -> Group:
    figures = "  ".join(f"{name} [bold]{value}[/bold]" for name, value in _figures(moment, seconds).items())
    return Group(Text.from_markup(figures), _devices(moment))


def _devices(moment: Observation) -> Table:
    drawn = Table()
    for heading in ("device", "state"):
        drawn.add_column(heading)
    for heading in ("base", "updates", "staleness", "up"):
        drawn.add_column(heading, justify="right")
    for device in moment.devices[:ROWS_MAX]:
        drawn.add_row(*_cells(device))
    if len(moment.devices) > ROWS_MAX:
        drawn.caption = f"and {len(moment.devices) - ROWS_MAX} more"
    return drawn


def _cells(device: Device) -> tuple[str, ...]:
    base = "" if device.base is None or device.base < 0 else str(device.base)
    staleness = "" if device.staleness is None else f"{device.staleness:.1f}"
    return device.name, device.state, base, str(device.updates), staleness, size(device.bytes_up)
