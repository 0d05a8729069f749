"""Who may connect to nats-server, and what they may do: at each connect it asks here, by its authorization callout.

nats-server by itself can map certificates to users that its configuration lists, but binds no MQTT client id to them,
so that any device could take over the session of any other. Here a certificate's name must be the client id, and what
it may read and write follows from it: nothing has to be listed.
"""

import json
import logging
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from ternbus.broker.errors import ConfigError, LinkError, ProtocolError
from ternbus.broker.link.tls import PROBE, ServerTls
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import AGGREGATOR, Identity, is_device, is_federation
from ternbus.broker.server import callout_tokens, certificates
from ternbus.broker.server.callout_tokens import Access, Question
from ternbus.broker.server.nats import Guard

SUBJECT: Final = "$SYS.REQ.USER.AUTH"
CONNECT_WITHIN_S: Final = 5.0
AGAIN_S: Final = 0.5

_log = logging.getLogger(__name__)


def decide(asked: Question) -> Access:
    """What a client may do; ProtocolError for one that may not come in, saying why."""
    if asked.kind != "mqtt":
        raise ProtocolError("not-mqtt", f"a connection of the kind {asked.kind!r}")
    if not asked.chain:
        raise ProtocolError("no-certificate", f"{asked.client_id!r} shows no certificate")
    named = certificates.read(asked.chain[0], "a client's certificate")
    if asked.client_id != named.name:
        # refusals.py reads this off the log: a foreign certificate's subject gets into it too, quotes escaped
        claimed = repr(asked.client_id[:80])
        raise ProtocolError("wrong-client-id", f'the certificate of "{named.name}" calls itself {claimed}')
    write, read = _subjects(named.name, named.federation)
    return Access(name=named.name, write=write, read=read, until=int(named.until.timestamp()))


def _subjects(name: str, federation: str) -> tuple[list[str], list[str]]:
    """(what it may write, what it may read); a subscription to `a/#` asks for the subjects `a` and `a.>`."""
    if name == PROBE:
        return [], []
    if not is_federation(federation):
        raise ProtocolError("no-federation", f"the certificate of {name!r} is for no federation")
    root = f"ternbus.1.{federation}"
    if name == f"{AGGREGATOR}-{federation}":
        return _subjects_of(topics.of_aggregator(federation)), _below(f"{root}.up", f"{root}.all")
    if is_device(name):
        return _subjects_of(topics.of_device(federation, name)), _below(f"{root}.down.{name}", f"{root}.all")
    raise ProtocolError("no-device", f"{name!r} names neither a device nor the aggregator of {federation!r}")


def _subjects_of(filters: Iterable[str]) -> list[str]:
    """The NATS subjects that nats-server makes of MQTT topics; no name has a dot."""
    return [each.replace("/", ".").replace("+", "*") for each in filters]


def _below(*parents: str) -> list[str]:
    return [subject for parent in parents for subject in (parent, f"{parent}.>")]


@dataclass(slots=True)
class AuthCallout:
    """Answers one nats-server until `close` is called. It keeps nothing on disk: its key is a new one each time."""

    identity: Identity = field(default_factory=Identity.generate)
    _socket: socket.socket | None = None
    _closed: threading.Event = field(default_factory=threading.Event)

    def guard(self, tls: ServerTls) -> Guard:
        """What nats-server's configuration must say, for it to ask here."""
        account, user = callout_tokens.account_key(self.identity), callout_tokens.user_key(self.identity)
        return Guard(tls=tls, account=account, doorkeeper=user)

    def attend(self, port: int) -> None:
        """Connect to NATS' own port on this machine, and answer from now on. LinkError where that cannot be."""
        stream = self._connect(port)
        threading.Thread(target=self._serve, args=(stream, port), name="doorkeeper", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _connect(self, port: int) -> Any:
        """The connection as a stream of bytes, whose exact type has no name that lasts."""
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), CONNECT_WITHIN_S)
            stream = self._socket.makefile("rwb")
            nonce = json.loads(stream.readline().removeprefix(b"INFO "))["nonce"]
            about = {
                "nkey": callout_tokens.user_key(self.identity),
                "sig": callout_tokens.proof(self.identity, nonce),
                "name": "ternbus doorkeeper",
                "lang": "python",
                "version": "1",
                "verbose": False,
            }
            stream.write(f"CONNECT {json.dumps(about)}\r\nSUB {SUBJECT} 1\r\nPING\r\n".encode())
            stream.flush()
            if (answer := stream.readline().strip()) != b"PONG":
                raise LinkError(f"nats-server does not let us guard its door: {answer.decode(errors='replace')}")
            self._socket.settimeout(None)
        except (OSError, ValueError, KeyError) as error:
            raise LinkError(f"nats-server does not let us guard its door on port {port}: {error}") from error
        return stream

    def _serve(self, stream: Any, port: int) -> None:
        """Answer; where the connection is lost though the server lives, begin again: without us nobody can connect."""
        while not self._closed.is_set():
            with suppress(OSError, ValueError):
                self._answer_all(stream)
            if self._closed.wait(AGAIN_S):
                return
            with suppress(LinkError):
                stream = self._connect(port)

    def _answer_all(self, stream: Any) -> None:
        while line := stream.readline():
            match line.split():
                case [b"MSG", _, _, reply, size]:
                    token = stream.read(int(size) + 2)[:-2].decode("ascii", "replace")
                    if answer := self._answer(token).encode():
                        stream.write(b"PUB %s %d\r\n%s\r\n" % (reply, len(answer), answer))
                        stream.flush()
                case [b"PING"]:
                    stream.write(b"PONG\r\n")
                    stream.flush()
                case _:  # +OK, or something for people
                    continue

    def _answer(self, token: str) -> str:
        try:
            asked = callout_tokens.question(token)
        except ProtocolError as error:  # another nats-server than this was written for; who waits is not let in
            _log.warning("%s", error)
            return ""
        try:
            return callout_tokens.welcome(self.identity, asked, decide(asked))
        except (ProtocolError, ConfigError) as error:
            return callout_tokens.refusal(self.identity, asked, str(error))
