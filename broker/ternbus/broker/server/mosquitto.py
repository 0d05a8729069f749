"""mosquitto: where it is, and the configuration and access list with which it serves a federation."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Final

from ternbus.broker.link.tls import ServerTls
from ternbus.broker.protocol import topics
from ternbus.broker.server.limits import CONNECTIONS_MAX

OLDEST: Final = (2, 0, 11)  # Debian 11's and 12's; older ones lack options, or fixes of what a client can send
SYSTEM_FOLDERS = "/usr/sbin:/usr/local/sbin"  # where distributions put it; not on an ordinary user's PATH


def find() -> Path | None:
    """The executable, if this machine has one."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path=SYSTEM_FOLDERS)
    return Path(found) if found else None


def version(executable: Path) -> str:
    """What the executable says that it is, such as ``2.0.11``."""
    # Its exit code is 3 even when it only prints its help.
    about = subprocess.run([executable, "-h"], capture_output=True, text=True, check=False, timeout=10).stdout
    found = re.search(r"version (\S+)", about)
    return found[1] if found else "of unknown version"


def is_recent(found: str) -> bool:
    """Whether a version that ``version`` gave is one that this configuration, and the protocol, may rely on."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    return numbers is not None and tuple(map(int, numbers.groups())) >= OLDEST


def access_list(federations: Sequence[str] = ()) -> str:
    """Who may read and write what (protocol, Topics): MQTT user names are device names, the aggregator's is its own.

    Names mean something only where the broker makes clients prove them. Without ``federations`` it does not, and
    everybody may do everything below ``ternbus/1``.
    """
    if not federations:
        return (
            "# As `ternbus broker up` generates it. Without certificates nobody proves a name, so there is nobody to\n"
            "# confine: what protects a federation here is that the broker listens on this machine only, and that\n"
            "# every message is signed.\n"
            "pattern readwrite ternbus/1/#\n"
        )
    several = len(federations) > 1
    lines = ["# A device writes what is its own, topic by topic, and reads what is for it and for all."]
    for name in federations:
        lines += [f"pattern {each}" for each in _of_device(name, "%u")]
    lines += ["", f"# The aggregator{'s' if several else ''} of {', '.join(federations)}."]
    for name in federations:
        lines += [f"user aggregator-{name}", *(f"topic {each}" for each in _of_aggregator(name))]
    return "\n".join(lines) + "\n"


def _of_device(federation: str, device: str) -> list[str]:
    root = topics.root(federation)
    written = [f"write {topic}" for topic in topics.of_device(federation, device)]
    return [*written, f"read {root}/down/{device}/#", f"read {root}/all/#"]


def _of_aggregator(federation: str) -> list[str]:
    root = topics.root(federation)
    written = [f"write {topic}" for topic in topics.of_aggregator(federation)]
    return [*written, f"read {root}/up/#", f"read {root}/all/#"]


def separating_list(names: Mapping[str, Sequence[str]]) -> str:
    """Who may read and write what, where names are proven, for each federation with the names of its members.

    One federation needs only patterns. With several each member is listed, or a device could enter another
    federation's topics under its own name.
    """
    if len(names) == 1:
        return access_list(list(names))
    lines = ["# Everybody that has a certificate, each with its own federation."]
    for federation, members in sorted(names.items()):
        for name in sorted(members):
            own = name == f"aggregator-{federation}"
            allowed = _of_aggregator(federation) if own else _of_device(federation, name)
            lines += [f"user {name}", *(f"topic {each}" for each in allowed)]
    return "\n".join(lines) + "\n"


def _admission(tls: ServerTls | None) -> str:
    if tls is None:
        return "allow_anonymous true\n"
    return f"""\
cafile {tls.authority}
certfile {tls.certificate}
keyfile {tls.key}
tls_version tlsv1.3

# Nobody without a certificate of ours, and nobody under another name than its certificate's.
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
"""


def configuration(
    *,
    host: str,
    port: int,
    data: PurePath,
    access: PurePath,
    tls: ServerTls | None = None,
    user: str | None = None,
    counted: bool = False,
) -> str:
    """The configuration of a broker. ``user`` is whom mosquitto becomes when root starts it.

    ``counted``: its log goes through `ternbus.broker.server.refusals`, so let it say what it denies, among all packets.
    All of it is understood by 2.0 and by 2.1, which would have ``acl_file`` as a plugin and says so in its log.
    """
    become = (
        f"\n# Started by root; what is not changed keeps its tie to `ternbus broker up`.\nuser {user}\n" if user else ""
    )
    stamp = "log_timestamp_format %Y-%m-%dT%H:%M:%S\n"
    lines = (
        "# What `ternbus broker refusals` reads; it keeps most of it out of the file, and notes the time of the rest.\n"
        "log_type debug\nlog_type subscribe\nlog_timestamp false\n"
    )
    return f"""\
# As `ternbus broker up` generates it.

listener {port} {host}
# A client that says nothing, or does not finish its handshake, is disconnected after 90 s, a time that mosquitto does
# not let anybody choose; until then it takes one of these.
max_connections {CONNECTIONS_MAX}
{_admission(tls)}acl_file {access}
{become}
# Whoever sends more than this in one packet is disconnected. MQTT 5 tells it the limit beforehand.
max_packet_size 1100000

# What waits for a client that reads slowly or is away. What exceeds it is dropped without a word.
max_inflight_messages 32
max_inflight_bytes 8388608
max_queued_messages 4000
max_queued_bytes 268435456
max_keepalive 120
persistent_client_expiration 14d

# Sessions, queues and retained messages survive an orderly restart. A crash loses at most five minutes of them,
# which the protocol makes good; saving each change rewrites the whole file every time.
persistence true
persistence_location {data}/
autosave_interval 300

set_tcp_nodelay true
connection_messages false
log_dest stderr
log_type error
log_type warning
log_type notice
{lines if counted else stamp}"""
