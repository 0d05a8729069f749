"""The updates per second of an aggregator with open dashboards, compared with one without a dashboard.

    python -m benchmarks.dashboard [--json] [--viewers 10] [--rounds 5] [--parameters 1200000] [--updates 2400]

The load is that of `benchmarks.ingest`: as fast as receipts arrive. A viewer is a connection that does what the page
does: it follows the server-sent events, and asks for the table of devices every three seconds. Rounds without and with
viewers alternate, so that both meet the same machine; the ratio is that of the medians.
"""

import http.client
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.ingest import FEDERATION, prepare, prepared_body, rate
from benchmarks.program import cpu_s, one_thread, options, print_result, wait_until
from benchmarks.sender import Load, Target, await_retained, run_load
from ternbus.broker.protocol import topics
from ternbus.broker.server.running import Engine, choose, start

FRAME_BYTES: Final = 120 * 1024
WINDOW: Final = 32
TABLE_EVERY_S: Final = 3.0
WITHIN_S: Final = 60.0


class Viewer:
    """A page that somebody has open, without a browser around it."""

    def __init__(self, host: str, port: int) -> None:
        self._place = (host, port)
        self._ended = threading.Event()
        self.events = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        stream = http.client.HTTPConnection(*self._place, timeout=WITHIN_S)
        stream.request("GET", "/events")
        answer = stream.getresponse()
        asked_at = -TABLE_EVERY_S
        while not self._ended.is_set() and (line := answer.readline()):
            if not line.startswith(b"data: "):
                continue
            self.events += 1
            if time.monotonic() - asked_at >= TABLE_EVERY_S:
                asked_at = time.monotonic()
                other = http.client.HTTPConnection(*self._place, timeout=WITHIN_S)
                other.request("GET", "/devices?sort=wrong&limit=50")
                assert other.getresponse().read()
                other.close()
        stream.close()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(WITHIN_S)


@contextmanager
def aggregator(directory: Path, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running one, with its log."""
    command = [sys.executable, "-m", "ternbus", "aggregator", "run", str(directory), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(WITHIN_S)


def dashboard_at(log: Path) -> tuple[str, int]:
    """Host and port, as the log of the aggregator says."""
    pattern = re.compile(r"dashboard at (http://\S+);")
    wait_until(lambda: pattern.search(log.read_text()) is not None, f"the dashboard's address in {log}", WITHIN_S)
    place = urlsplit(pattern.findall(log.read_text())[0])
    assert place.hostname is not None
    assert place.port is not None
    return place.hostname, place.port


def dashboard_of(pid: int) -> int:
    """The process of an aggregator's dashboard."""
    found = [int(each) for task in Path(f"/proc/{pid}/task").glob("*/children") for each in task.read_text().split()]
    (child,) = [each for each in found if b"ternbus.aggregator.dashboard" in Path(f"/proc/{each}/cmdline").read_bytes()]
    return child


def measure(url: str, about: Target, load: Load, place: Path, viewers: int) -> dict[str, float]:
    """Updates a second, the aggregator's CPU an update, and how often each viewer was told something."""
    prepare(place, url, load)
    log = place.with_suffix(".log")
    options = ["--dashboard", "127.0.0.1:0"] if viewers else []
    with aggregator(place, log, *options) as process:
        await_retained(about, topics.status(FEDERATION))
        watching = [Viewer(*dashboard_at(log)) for _ in range(viewers)]
        shown = dashboard_of(process.pid) if viewers else process.pid
        before, shown_before, began = cpu_s(process.pid), cpu_s(shown), time.monotonic()
        answered = run_load(about, load)
        spent, share = cpu_s(process.pid) - before, (cpu_s(shown) - shown_before) / (time.monotonic() - began)
        for viewer in watching:
            viewer.stop()
    assert sum(sum(one.outcomes.values()) for one in answered) == load.updates
    return {
        "updates_per_s": rate(answered),
        "cpu_ms": 1000 * spent / load.updates,
        "events": median(viewer.events for viewer in watching) if watching else 0,
        "dashboard_cores": share if watching else 0.0,
    }


def run(viewers: int, rounds: int, parameters: int, updates: int) -> dict[str, Any]:
    """All rounds."""
    load = Load(parameters=parameters, updates=updates, window=WINDOW, frame_bytes=FRAME_BYTES)
    found: dict[int, list[dict[str, float]]] = {0: [], viewers: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            order: Sequence[int] = (0, viewers) if number % 2 == 0 else (viewers, 0)
            for count in order:
                name = f"{number}-{count}"
                place = Path(folder) / f"broker-{name}"
                with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=place) as broker:
                    about = Target(broker.endpoint.host, broker.endpoint.port, FEDERATION, *prepared_body(parameters))
                    found[count].append(measure(broker.url, about, load, Path(folder) / f"agg-{name}", count))
    without, watched = (median(row["updates_per_s"] for row in found[count]) for count in (0, viewers))
    return {
        "viewers": viewers,
        "rounds": rounds,
        "parameters": parameters,
        "updates": updates,
        "without_per_s": without,
        "watched_per_s": watched,
        "ratio": watched / without,
        "cpu_ms": {str(count): median(row["cpu_ms"] for row in rows) for count, rows in found.items()},
        "all_per_s": {str(count): [row["updates_per_s"] for row in rows] for count, rows in found.items()},
        "events": median(row["events"] for row in found[viewers]),
        "dashboard_cores": median(row["dashboard_cores"] for row in found[viewers]),
    }


def show(row: dict[str, Any]) -> None:
    """Print text."""
    print(f"{os.cpu_count()} cores for all processes, {row['parameters']:,} parameters, {row['rounds']} rounds")
    print(f"without a dashboard      {row['without_per_s']:7.0f} updates/s, {row['cpu_ms']['0']:.2f} ms CPU each")
    about = f"{row['cpu_ms'][str(row['viewers'])]:.2f} ms CPU each, {row['events']:.0f} looks seen"
    print(f"with {row['viewers']:2} open dashboards  {row['watched_per_s']:7.0f} updates/s, {about}")
    print(f"ratio                    {row['ratio']:7.3f}; the dashboard took {row['dashboard_cores']:.3f} of a core")


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--viewers", type=int, default=10, help="open dashboards")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind")
    parser.add_argument("--parameters", type=int, default=1_200_000, help="size of the model")
    parser.add_argument("--updates", type=int, default=2400, help="updates a round")
    given = parser.parse_args()
    one_thread()
    row = run(given.viewers, given.rounds, given.parameters, given.updates)
    print_result(row, as_json=given.json, show=lambda: show(row))


if __name__ == "__main__":
    main()
