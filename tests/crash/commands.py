"""Commands that keep a folder, as processes that are killed at a crash point."""

import os
import signal
import subprocess
import sys
from typing import Final

from ternbus.broker.crash_points import VARIABLE

PRUNING: Final = ("archive-written", "rows-removed")
BACKING_UP: Final = ("backup-checked", "backup-renamed")
RESTORING: Final = ("moved-aside:3", "coming", "ledger-moved")
MENDING: Final = ("outbox-moved-aside", "outbox-salvaged")  # an outbox
REPAIRING: Final = ("moved-aside", "ledger-coming")
POINTS: Final = {point.partition(":")[0] for point in (*PRUNING, *BACKING_UP, *RESTORING, *REPAIRING, *MENDING)}


def killed(point: str, *words: object) -> None:
    """Run a command that is killed at a point, NAME or NAME:COUNT."""
    command = [sys.executable, "-m", "ternbus", *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, VARIABLE: point}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr.endswith(f"killed at the crash point {point.partition(':')[0]}\n")
