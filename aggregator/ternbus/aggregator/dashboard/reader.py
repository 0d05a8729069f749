"""Reads the ledger for all viewers together: at most once a second, and only while somebody looks."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from ternbus.aggregator.core.health import Health
from ternbus.aggregator.dashboard import summary
from ternbus.aggregator.dashboard.devices import Devices
from ternbus.aggregator.dashboard.history import KEPT, RECENT, History
from ternbus.aggregator.shell import administration, examination, log
from ternbus.aggregator.store import merge_log, version_traffic
from ternbus.aggregator.store.ledger import blaming, reading
from ternbus.broker.errors import ConfigError, FederationError

EVERY_S: Final = 1.0
DUTY: Final = 0.05  # of a core, at most, for one kind of read: a large federation is looked at more rarely
AGED_S: Final = 10.0  # beyond its time, in which a value still serves while the next one is read
QUIET_S: Final = 4.0  # without a look, after which viewers are told that the connection is alive
ENTRIES_MAX: Final = 64  # versions of the log of merges that are remembered
UPDATES_MAX: Final = 1000  # of one version that are shown

Value = TypeVar("Value")
_log = logging.getLogger(__name__)


class Paced(Generic[Value]):
    """A read in a thread whose result serves everybody who asks until the next one is due, and while that is made."""

    def __init__(self, read: Callable[[], Value], pool: ThreadPoolExecutor) -> None:
        self._read, self._pool = read, pool
        self._lock = asyncio.Lock()
        self._values: list[Value] = []  # the newest, or none
        self.due_at = 0.0  # of the monotonic clock
        self.every_s = EVERY_S

    async def value(self) -> Value:
        if self._values and self._lock.locked() and time.monotonic() < self.due_at + AGED_S:
            return self._values[0]
        async with self._lock:
            if not self._values or time.monotonic() >= self.due_at:
                began = time.monotonic()
                value, spent_s = await asyncio.get_running_loop().run_in_executor(self._pool, self._timed)
                self._values = [value]
                self.every_s = max(EVERY_S, spent_s / DUTY)
                self.due_at = began + self.every_s
            return self._values[0]

    def _timed(self) -> tuple[Value, float]:
        began = time.thread_time()
        return self._read(), time.thread_time() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One look, shared by all viewers. Where it failed, ``fault`` says why and the rest is of the look before."""

    event: bytes  # as server-sent event
    fault: str = ""
    health: Health | None = None
    devices: Devices | None = None


@dataclass(slots=True)
class Reader:
    """All reads of one directory; call ``close`` to end the streams."""

    directory: Path
    history: History = field(default_factory=History)
    viewers: int = 0
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="reader"))
    _look: Paced[Moment] = field(init=False)
    _last: Moment | None = None  # that viewers get
    _before: Moment | None = None  # the newest one, whoever asked for it
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _pump: asyncio.Task[None] | None = None
    _closed: bool = False
    _entries: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._look = Paced(self._take_a_look, self.pool)

    async def moment(self) -> Moment:
        """The newest look, or a new one if that is due."""
        return await self._look.value()

    async def follow(self) -> AsyncGenerator[Moment | None, None]:
        """Each new look while the caller waits for it: one that is slow misses some. None: nothing for a while."""
        self.viewers += 1
        if self._pump is None or self._pump.done():
            self._last = None  # of the last viewer before, perhaps of yesterday
            self._pump = asyncio.create_task(self._keep_looking())
        shown: Moment | None = None
        try:
            while not self._closed:
                if self._last is not shown:
                    shown = self._last
                    yield shown
                    continue
                try:
                    async with asyncio.timeout(QUIET_S), self._changed:
                        await self._changed.wait()
                except TimeoutError:
                    yield None
        finally:
            self.viewers -= 1

    async def close(self) -> None:
        """End all streams."""
        self._closed = True
        async with self._changed:
            self._changed.notify_all()

    async def _keep_looking(self) -> None:
        while self.viewers and not self._closed:
            self._last = await self.moment()
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(max(0.0, self._look.due_at - time.monotonic()))

    async def entry(self, version: int) -> dict[str, Any]:
        """A version's entry in the log of merges; ConfigError where there is none."""
        if version not in self._entries:
            found = await asyncio.get_running_loop().run_in_executor(self.pool, self._entry, version)
            while len(self._entries) >= ENTRIES_MAX:
                del self._entries[next(iter(self._entries))]
            self._entries[version] = found
        return self._entries[version]

    def _take_a_look(self) -> Moment:
        """In the reader's thread. A fault is a value: nobody may take the figures of before for those of now."""
        before = self._before
        try:
            with blaming(self.directory):
                state, seen = self._read()
        except ConfigError as error:  # of the settings, as a rule; it names the file
            fault = str(error)
        except (FederationError, OSError) as error:
            fault = f"the ledger cannot be read: {error}"
        except Exception:  # noqa: BLE001 - a bug must not leave old figures on the page as if they were new
            if before is None or not before.fault:
                _log.exception("a look at the ledger failed")
            fault = "the ledger cannot be read: a bug; the aggregator's log has the details"
        else:
            event = _event({**state, "every_s": self._look.every_s})
            self._before = Moment(event=event, health=seen.health, devices=Devices(seen))
            return self._before
        event = _event({"at": time.time(), "fault": fault, "head": None})
        self._before = Moment(event=event, fault=fault, devices=None if before is None else before.devices)
        return self._before

    def _read(self) -> tuple[dict[str, Any], examination.Examination]:
        history = self.history
        settings = administration.load_settings(self.directory)
        seen = examination.look(self.directory, RECENT if history.rows else KEPT)
        if history.lacks(seen.found["versions"]):
            seen = examination.look(self.directory, KEPT)
        with reading(self.directory) as ledger:
            first = max(history.counted_to, seen.found["version"] - KEPT)
            traffic, kept = version_traffic.read(ledger, first), version_traffic.kept(ledger)
        history.take(seen.found["versions"], traffic)
        return summary.of(seen, history, kept, settings, time.time()), seen

    def _entry(self, version: int) -> dict[str, Any]:
        found = next(log.entries(self.directory, version), None)
        if found is None:
            raise ConfigError(f"the log of merges has no version {version}")
        entry, _ = found
        with reading(self.directory) as ledger:
            digest = merge_log.digest(ledger, version)
        members: list[tuple[str, int, float | None]] = [(each.device, each.seq, each.weight) for each in entry.updates]
        members += [(each.device, each.seq, None) for each in entry.members]  # of a sum, whose weight is one
        return {
            "version": version,
            "digest": entry.digest.hex(),
            "same_in_ledger": digest is None or digest == entry.digest,
            "previous": entry.previous.hex(),
            "rollback": entry.rollback,
            "updates": members[:UPDATES_MAX],
            "updates_count": len(members),
            "dropped": [[each.update.device, each.update.seq, each.reason] for each in entry.dropped[:UPDATES_MAX]],
        }


def _event(state: dict[str, Any]) -> bytes:
    """A server-sent event (HTML Living Standard, section 9.2); JSON has no line ends of its own."""
    return b"data: " + json.dumps(summary.finite(state), allow_nan=False).encode() + b"\n\n"
