"""What the benchmarks share as programs: options, output, waiting, and the resource use of a process.

It imports little: devices whose memory is measured import it too.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Final

ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
LOOK_S: Final = 0.02  # between two looks at what is waited for


def environment() -> dict[str, str]:
    """The environment of child processes: as here, but Python keeps what it has compiled, as where it is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def options(doc: str | None, engine: type[Enum] | None = None) -> argparse.ArgumentParser:
    """A parser for a module with this docstring: ``--json`` and, with the brokers to choose from, ``--engine``."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    if engine is not None:
        parser.add_argument("--engine", type=engine, default="auto", help="broker software: auto, mosquitto or nats")
    return parser


def print_result(found: object, *, as_json: bool, show: Callable[[], object]) -> None:
    """Print a result as JSON, or let ``show`` print it."""
    if as_json:
        print(json.dumps(found))
    else:
        show()


def one_thread() -> None:
    """Let the linear algebra of this process and its children use one thread, unless the user chose otherwise."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def wait_until(holds: Callable[[], bool], what: str, within_s: float) -> None:
    """Look until ``holds()`` is true; TimeoutError says what did not come."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(LOOK_S)


def cpu_ms(do: Callable[[], object], runs: int = 15) -> float:
    """Median CPU milliseconds of this thread for a call."""
    spent = []
    for _ in range(runs):
        began = time.thread_time()
        do()
        spent.append(1000 * (time.thread_time() - began))
    return statistics.median(spent)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its threads so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int, field: str = "VmHWM") -> float:
    """The resident memory of a process in MiB: VmHWM is the peak, VmRSS the current value."""
    return _table(Path(f"/proc/{pid}/status"))[field] / 1024


def used(pid: int | None = None) -> dict[str, float]:
    """Peak and current memory in KiB, wakeups of all threads, and bytes written, of a process; None: of this one."""
    process = Path("/proc") / ("self" if pid is None else str(pid))
    found = _table(process / "status")
    wakeups = sum(_table(each)["voluntary_ctxt_switches"] for each in process.glob("task/*/status"))
    written = _table(process / "io").get("write_bytes", 0)
    return {"peak_kb": found["VmHWM"], "resident_kb": found["VmRSS"], "wakeups": wakeups, "written_bytes": written}


def _table(path: Path) -> dict[str, int]:
    """The numbers in a file of the kernel with lines ``name: number``."""
    rows = (line.partition(":") for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) for name, _, value in rows if value.split() and value.split()[0].isdigit()}
