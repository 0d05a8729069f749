"""An aggregator process under measurement: its CPU time, memory and idle load."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.program import cpu_s, resident_mb, wait_until

CONNECTED_S: Final = 300.0  # with a large ledger


@dataclass(slots=True)
class Aggregator:
    """A running aggregator process and its resource use."""

    process: subprocess.Popen[bytes]
    began_s: float  # from the start until it was connected

    @property
    def cpu_s(self) -> float:
        return cpu_s(self.process.pid)

    def settled_kb(self) -> float:
        """The resident memory, in KiB, when the process is almost idle."""
        while True:
            before = self.cpu_s
            time.sleep(2.0)  # over which the load is taken
            if self.cpu_s - before < 0.2:
                return 1024 * resident_mb(self.process.pid, "VmRSS")

    def idle_share(self, seconds: float = 5.0) -> float:
        """The share of a core that the idle process uses."""
        before = self.cpu_s
        time.sleep(seconds)  # what is measured
        return (self.cpu_s - before) / seconds

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def run_aggregator(directory: Path, log: Path) -> Aggregator:
    """Start an aggregator and wait until it is connected."""
    began = time.monotonic()
    command = [sys.executable, "-m", "ternbus", "aggregator", "run", str(directory)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output)

    def is_connected() -> bool:
        assert process.poll() is None, log.read_text()
        return b"connected (" in log.read_bytes()

    wait_until(is_connected, "the aggregator is connected", CONNECTED_S)
    return Aggregator(process, time.monotonic() - began)
