"""A progress bar: one line that is redrawn, in a terminal and in Jupyter; elsewhere a line every few seconds."""

import html
import sys
import time
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Drawn

from ternbus.broker.protocol.direction import for_people, primary_of
from ternbus.lab.notebook.callbacks import State

LINE_EVERY_S: Final = 2.0
METRICS_MAX: Final = 3


class Progress:
    """A progress bar with the newest metrics of the test data; the callback that a run has by default.

    `stream` is where it is drawn, by default where `print` writes.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self._shown: _Line | None = None

    def on_version(self, state: State) -> None:
        if state.version == 0 or self._shown is None:
            self.on_end(None)
            self._shown = _display(self._stream or sys.stdout)
        self._shown.show(state)

    def say(self, line: str) -> None:
        stream = self._stream or sys.stdout
        if self._shown is None:
            print(line, file=stream, flush=True)
        else:
            self._shown.say(line)

    def on_end(self, _: object) -> None:
        if self._shown is not None:
            self._shown.close()
            self._shown = None


def figures(state: State) -> str:
    """The state in a line, as in "version 3/20  mae 0.213  r2 0.91"."""
    total = "" if state.versions is None else f"/{state.versions}"
    names = for_people(state.metrics, primary_of(state.metrics))[:METRICS_MAX]
    return "  ".join([f"version {state.version}{total}", *(f"{name} {state.metrics[name]:.4g}" for name in names)])


class _Line:
    """Lines of text, for logs and pipes: the first state, one every few seconds, and the last."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._next = 0.0
        self._kept = ""

    def show(self, state: State) -> None:
        self._kept = figures(state)
        if time.monotonic() >= self._next:
            self._write()

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._kept:
            self._write()

    def _write(self) -> None:
        self.say(self._kept)
        self._kept, self._next = "", time.monotonic() + LINE_EVERY_S


class _Terminal(_Line):
    """A bar that is redrawn in place, without a thread."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._bar = Drawn(*columns, console=Console(file=stream), auto_refresh=False)
        self._task: TaskID | None = None
        self._bar.start()

    def show(self, state: State) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=state.versions)
        self._bar.update(self._task, completed=state.version, description=figures(state), refresh=True)

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class _Cell(_Line):
    """A bar in the output of a notebook's cell, which is replaced in place; it needs no widgets."""

    def __init__(self, stream: IO[str], display: Any) -> None:
        super().__init__(stream)
        self._display: Any = display
        self._handle: Any = None

    def show(self, state: State) -> None:
        share = f' max="{state.versions}" value="{state.version}"' if state.versions else ""
        text = figures(state)
        bundle = {"text/plain": text, "text/html": f"<progress{share}></progress> {html.escape(text)}"}
        if self._handle is None:
            self._handle = self._display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def close(self) -> None:
        """Nothing: the last state stays."""


def _display(stream: IO[str]) -> _Line:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel") and stream is sys.stdout:
        return _Cell(stream, sys.modules["IPython"].display.display)
    console = Console(file=stream)
    return _Terminal(stream) if console.is_terminal and not console.is_dumb_terminal else _Line(stream)
