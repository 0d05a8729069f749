"""A bound on what nats-server keeps of messages for sessions whose clients are away; its configuration has none.

It keeps them in one stream for all sessions, as long as a session exists: one device that has subscribed once and left
would fill the disk with the federation's messages. Beyond the bound the oldest are dropped, as other brokers do.
"""

import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

_log = logging.getLogger(__name__)

STREAM: Final = "$MQTT_msgs"
MAX_BYTES: Final = 1 << 30  # JetStream reserves it: a small disk must have room for it
MAX_AGE_NS: Final = 14 * 24 * 3600 * 10**9
INBOX: Final = "_INBOX.ternbus"
WITHIN_S: Final = 10.0


def bound(port: int, introduce: Callable[[str], Mapping[str, object]]) -> None:
    """Bound the stream, which the first MQTT client makes nats-server create; a warning where that fails.

    ``port`` is that of the NATS protocol on this machine, ``introduce`` makes the content of CONNECT from the server's
    nonce.
    """
    try:
        with (
            socket.create_connection(("127.0.0.1", port), WITHIN_S) as connection,
            connection.makefile("rwb") as stream,
        ):
            about = introduce(json.loads(stream.readline().removeprefix(b"INFO ")).get("nonce", ""))
            stream.write(f"CONNECT {json.dumps(about)}\r\nSUB {INBOX} 1\r\n".encode())
            found = _request(stream, f"$JS.API.STREAM.INFO.{STREAM}", {})
            wanted = found | {"max_bytes": MAX_BYTES, "max_age": MAX_AGE_NS, "discard": "old"}
            _request(stream, f"$JS.API.STREAM.UPDATE.{STREAM}", wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("nats-server keeps without a bound what devices that are away have not got: %s", error)


def _request(stream: Any, subject: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The stream's configuration in JetStream's answer; ValueError with the reason for an error."""
    request = json.dumps(content).encode() if content else b""
    stream.write(b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), INBOX.encode(), len(request), request))
    stream.flush()
    while line := stream.readline():
        match line.split():
            case [b"MSG", _, _, size]:
                answer = json.loads(stream.read(int(size) + 2))
                if "error" in answer:
                    raise ValueError(answer["error"].get("description", "an error of JetStream"))
                return dict(answer["config"])
            case [b"-ERR", *_]:
                raise ValueError(line.decode(errors="replace").strip())
            case _:  # +OK, PING and other lines that need no answer
                continue
    raise ValueError("it ended the connection")
