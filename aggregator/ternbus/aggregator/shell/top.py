"""The screen of `ternbus top`: health, devices and versions of an aggregator, live; the only user of textual."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final

from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Footer, Static
from textual.worker import get_current_worker

from ternbus.aggregator.shell import health_text
from ternbus.aggregator.shell.examination import Examination
from ternbus.aggregator.shell.health_text import age
from ternbus.aggregator.store.device_metrics import shown_value
from ternbus.broker.errors import FederationError

DEVICES_MAX: Final = 500  # that are shown, those with a finding first; a screen has less room than a federation devices
VERSIONS_MAX: Final = 20
DEVICES: Final = ("device", "state", "updates", "staleness", "last answer", "refused", "stale", "loss", "seen", "wrong")
VERSIONS: Final = ("version", "updates", "staleness", "metric", "age")
Tables = Mapping[str, list[list[str]]]  # the cells of each row, by the table's id


class Top(App[None]):
    """Looks every few seconds, in a thread of its own: a look may wait for the aggregator."""

    TITLE = "ternbus top"
    ENABLE_COMMAND_PALETTE = False
    CSS = "#health { height: auto; padding: 0 1; } DataTable { height: auto; margin: 1 0 0 0; }"
    BINDINGS: ClassVar[list[BindingType]] = [("q", "quit", "Quit"), ("r", "look", "Look now")]

    def __init__(
        self,
        look: Callable[[], Examination],
        *,
        broker: str,
        every_s: float,
        blaming: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``look`` examines the aggregator, and ``blaming`` says what is damaged; ``broker`` is the address to show."""
        super().__init__()
        self._look_at, self._blaming = look, blaming
        self._broker = broker
        self._every_s = every_s

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static("looking …", id="health", markup=False)
            yield DataTable(id="devices", cursor_type="row")
            yield DataTable(id="versions", cursor_type="none")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#devices", DataTable).add_columns(*DEVICES)
        self.query_one("#versions", DataTable).add_columns(*VERSIONS)
        self.action_look()
        self.set_interval(self._every_s, self.action_look)

    def action_look(self) -> None:
        """Look once more, unless the last look has not ended."""
        if not any(worker.is_running for worker in self.workers):
            self.run_worker(self._look, thread=True)

    def _look(self) -> None:
        worker = get_current_worker()
        tables: Tables | None = None
        try:
            with self._blaming():
                seen, now = self._look_at(), time.time()
                text = "\n".join(health_text.lines(seen.health, now, self._broker))
                tables = {"#devices": _devices(seen, now), "#versions": _versions(seen, now)}
        except (FederationError, OSError) as error:
            text = f"cannot be read: {error}"
        if not worker.is_cancelled:
            self.call_from_thread(self._show, text, tables)

    def _show(self, text: str, tables: Tables | None) -> None:
        """The health, and the rows of both tables; None leaves them."""
        self.query_one("#health", Static).update(text)
        for name, rows in (tables or {}).items():
            table = self.query_one(name, DataTable)
            table.clear()
            table.add_rows(rows)


def _devices(seen: Examination, now: float) -> list[list[str]]:
    wrong = {each.subject: each.kind for each in reversed(seen.health.findings) if each.subject}
    rows = sorted(seen.found["devices"].items(), key=lambda row: (row[0] not in wrong, row[0]))
    return [_device(name, row, wrong.get(name, ""), now) for name, row in rows[:DEVICES_MAX]]


def _versions(seen: Examination, now: float) -> list[list[str]]:
    rows = reversed(seen.found["versions"][-VERSIONS_MAX:])
    return [_version(row, seen.found["metric"], now) for row in rows]


def _device(name: str, row: Mapping[str, Any], wrong: str, now: float) -> list[str]:
    answer, state = row["answer"], row["state"] if row["key_state"] == "active" else row["key_state"]
    cells = [row["updates"], row["staleness"], None if answer is None else answer["outcome"]]
    shares = [None if row[each] is None else f"{row[each]:.0%}" for each in ("refused_share", "stale_share")]
    loss = None if row["loss"] is None else f"{row['loss']:.4g}"
    seen = None if row["seen_at"] is None else age(max(0.0, now - row["seen_at"]))
    role = ", evaluates" if row["evaluates"] else ""
    return [
        name,
        f"{state}{role}",
        *("" if each is None else str(each) for each in (*cells, *shares, loss, seen)),
        wrong,
    ]


def _version(row: Mapping[str, Any], metric: str | None, now: float) -> list[str]:
    value = row["metrics"].get(metric)
    staleness = f"{row['staleness_mean']:.2f}/{row['staleness_max']}"
    return [str(row["version"]), str(row["updates"]), staleness, shown_value(value), age(max(0.0, now - row["time"]))]
