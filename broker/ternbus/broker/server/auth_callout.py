"""The authorization service of nats-server: it admits each MQTT client and sets its permissions (auth callout).

On its own, nats-server can map certificates to configured users, but it does not compare the MQTT client id: any
device could take over another device's session. This service requires that the client id is the name in the
certificate, and derives the permitted subjects from that name, so that the configuration needs no list of users.
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
from ternbus.broker.protocol.identity import (
    AGGREGATOR,
    HELPER_USER,
    Identity,
    is_device,
    is_federation,
    is_helper_user,
    is_reader_user,
)
from ternbus.broker.server import callout_tokens, certificates
from ternbus.broker.server.callout_tokens import Access, Question
from ternbus.broker.server.nats import Guard

SUBJECT: Final = "$SYS.REQ.USER.AUTH"
CONNECT_WITHIN_S: Final = 5.0
AGAIN_S: Final = 0.5

_log = logging.getLogger(__name__)


def decide(asked: Question) -> Access:
    """The permissions of a client; ProtocolError, with the reason, if the client is not admitted."""
    if asked.kind != "mqtt":
        raise ProtocolError("not-mqtt", f"a connection of type {asked.kind!r}")
    if not asked.chain:
        raise ProtocolError("no-certificate", f"{asked.client_id!r} sent no certificate")
    named = certificates.read(asked.chain[0], "a client's certificate")
    if asked.client_id != named.name:
        # refusals.py parses this line in the log; repr escapes the quotes that a client may have put into its id
        claimed = repr(asked.client_id[:80])
        raise ProtocolError("wrong-client-id", f'the certificate of "{named.name}" calls itself {claimed}')
    write, read = _subjects(named.name, named.federation)
    return Access(name=named.name, write=write, read=read, until=int(named.until.timestamp()))


def _subjects(name: str, federation: str) -> tuple[list[str], list[str]]:
    """(subjects to publish, subjects to subscribe); an MQTT subscription to `a/#` needs the subjects `a` and `a.>`."""
    if name == PROBE:
        return [], []
    if not is_federation(federation):
        raise ProtocolError("no-federation", f"the certificate of {name!r} names no federation")
    root = f"ternbus.1.{federation}"
    if name == f"{AGGREGATOR}-{federation}":
        return _subjects_of(topics.of_aggregator(federation)), _below(f"{root}.up", f"{root}.all", f"{root}.help")
    if is_device(name):
        return _subjects_of(topics.of_device(federation, name)), _below(f"{root}.down.{name}", f"{root}.all")
    if is_helper_user(name):
        helper = name.removeprefix(HELPER_USER)
        readable = [*_below(f"{root}.help.{helper}"), *_subjects_of([topics.status(federation)])]
        return _subjects_of(topics.of_helper(federation, helper)), readable
    if is_reader_user(name):
        return [], _below(f"{root}.view", topics.DISCOVERY)
    raise ProtocolError("no-device", f"{name!r} is no device, helper or reader, nor the aggregator of {federation!r}")


def _subjects_of(filters: Iterable[str]) -> list[str]:
    """The NATS subjects that nats-server makes of MQTT topics; no name has a dot."""
    return [each.replace("/", ".").replace("+", "*") for each in filters]


def _below(*parents: str) -> list[str]:
    return [subject for parent in parents for subject in (parent, f"{parent}.>")]


@dataclass(slots=True)
class AuthCallout:
    """Answers the requests of one nats-server until `close`. Each object has a new key; nothing is kept on disk."""

    identity: Identity = field(default_factory=Identity.generate)
    _socket: socket.socket | None = None
    _closed: threading.Event = field(default_factory=threading.Event)

    def guard(self, tls: ServerTls) -> Guard:
        """The part of nats-server's configuration that directs its requests to this service."""
        account, user = callout_tokens.account_key(self.identity), callout_tokens.user_key(self.identity)
        return Guard(tls=tls, account=account, callout_user=user)

    def attend(self, port: int) -> None:
        """Connect to nats-server's NATS port on this machine and answer its requests in a thread; else LinkError."""
        stream = self._connect(port)
        threading.Thread(target=self._serve, args=(stream, port), name="auth callout", daemon=True).start()

    def introduction(self, nonce: str) -> dict[str, object]:
        """What this service says of itself in CONNECT, for the server's nonce."""
        return {
            "nkey": callout_tokens.user_key(self.identity),
            "sig": callout_tokens.proof(self.identity, nonce),
            "name": "ternbus auth callout",
            "lang": "python",
            "version": "1",
            "verbose": False,
        }

    def close(self) -> None:
        self._closed.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _connect(self, port: int) -> Any:
        """A buffered byte stream to nats-server; the type that `makefile` returns has no public name."""
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), CONNECT_WITHIN_S)
            stream = self._socket.makefile("rwb")
            nonce = json.loads(stream.readline().removeprefix(b"INFO "))["nonce"]
            about = self.introduction(nonce)
            stream.write(f"CONNECT {json.dumps(about)}\r\nSUB {SUBJECT} 1\r\nPING\r\n".encode())
            stream.flush()
            if (answer := stream.readline().strip()) != b"PONG":
                raise LinkError(f"nats-server refuses the authorization service: {answer.decode(errors='replace')}")
            self._socket.settimeout(None)
        except (OSError, ValueError, KeyError) as error:
            raise LinkError(
                f"cannot connect the authorization service to nats-server on port {port}: {error}"
            ) from error
        return stream

    def _serve(self, stream: Any, port: int) -> None:
        """Answer requests, and reconnect after a lost connection: without this service no client can connect."""
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
                case _:  # +OK, INFO and other lines that need no answer
                    continue

    def _answer(self, token: str) -> str:
        try:
            asked = callout_tokens.question(token)
        except ProtocolError as error:  # an unknown version of nats-server: without an answer, it refuses the client
            _log.warning("%s", error)
            return ""
        try:
            return callout_tokens.welcome(self.identity, asked, decide(asked))
        except (ProtocolError, ConfigError) as error:
            return callout_tokens.refusal(self.identity, asked, str(error))
