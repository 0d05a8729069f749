"""A count of refused clients and requests, from the broker's log; a script that needs only stdlib.

A separate process reads the broker's log from a pipe, filters it into a file, and ends when the pipe is closed. The
broker therefore never waits for the process that started it, and can still log after that process has ended.
mosquitto logs a denied message only among all packets (``log_type debug``); the other packet lines are removed here.
It grants subscriptions that it will not deliver; subscriptions are therefore compared with the access list here. Log
lines contain text that clients chose, such as topics, so all lengths and counts are bounded.
"""

import fcntl
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

FILE: Final = "refusals.json"
LOG: Final = "broker.log"
ACCESS: Final = "access.list"
CLIENTS_MAX: Final = 200  # counted by name
LINE_BYTES: Final = 2048
DETAIL_CHARS: Final = 120
LOG_BYTES: Final = 4 << 20  # then a new file is begun, and one older file is kept
READ_BYTES: Final = 1 << 20
NAP_S: Final = 0.02  # between reads: a wake-up for each line would take as much time as the broker needs to write it
SAVE_EVERY_S: Final = 0.5

NO_NAME: Final = "?"  # clients without a valid certificate
OTHERS: Final = "*"  # all clients after the first CLIENTS_MAX
REASONS: Final[Mapping[str, str]] = {
    "no-certificate": "sent no certificate",
    "bad-certificate": "sent a certificate that is expired or not issued by this broker's authority",
    "old-tls": "uses TLS 1.2 or older",
    "no-handshake": "ended the TLS handshake: not a TLS client, or it does not trust this broker's certificate",
    "wrong-client-id": "used a client id that is not the name in its certificate",
    "not-admitted": "connected without MQTT, or with a certificate that names no device, helper, reader or aggregator",
    "write-denied": "published to a topic of another client",
    "read-denied": "subscribed to topics of another client",
}
# Handshake errors in the logs of OpenSSL (mosquitto) and Go (nats-server), by a part of their text.
HANDSHAKES: Final[Mapping[str, str]] = {
    "did not return a certificate": "no-certificate",
    "didn't provide a certificate": "no-certificate",
    "certificate verify failed": "bad-certificate",
    "failed to verify certificate": "bad-certificate",
    "unsupported protocol": "old-tls",
    "only unsupported versions": "old-tls",
}
NAME: Final = r"(?P<client>[a-z0-9][a-z0-9_-]{0,63})"  # as in certificates
OPENSSL: Final = re.compile(r"OpenSSL Error[^\[]*\[0\]: (?P<why>.*)")
DENIED: Final = re.compile(rf"Denied PUBLISH from {NAME} \([^']*'(?P<topic>.*)")
SUBSCRIBED: Final = re.compile(rf"{NAME} [012] (?:\$share/[^/]*/)?(?P<filter>.+)")
GRANTED: Final = re.compile(rf"Client \S+ negotiated |{NAME} [012] ")
HANDSHAKE: Final = re.compile(r"\[ERR\] (?P<peer>\S+):\d+ - \S+ - TLS handshake error: (?P<why>.*)")
VIOLATION: Final = re.compile(
    rf'\[ERR\] \S+ - \S+ - "{NAME}" - (?P<what>Publish|Subscription) Violation - Subject "(?P<subject>[^"]*)'
)
CALLOUT: Final = re.compile(
    r"\[WRN\] Auth callout service returned an error: "
    rf'(?:wrong-client-id: the certificate of "{NAME}" calls itself (?P<other>.*)|(?P<why>.*))'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One refused request or connection; ``detail`` is the topic or client id, or the address of an unknown client."""

    client: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The topic filters that each client may read, from mosquitto's access list; those of None are for all clients.

    What a client is ``denied`` comes before.
    """

    readable: Mapping[str | None, list[str]] = field(default_factory=dict)
    denied: Mapping[str | None, list[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Access":
        found: dict[str | None, list[str]] = {}
        denied: dict[str | None, list[str]] = {}
        user: str | None = None
        for line in text.splitlines():
            match line.split():
                case ["user", name]:
                    user = name
                case ["topic" | "pattern" as kind, "read" | "readwrite", topics]:
                    found.setdefault(user if kind == "topic" else None, []).append(topics)
                case ["topic", "deny", topics]:
                    denied.setdefault(user, []).append(topics)
                case _:  # write permissions and comments
                    continue
        return cls(readable=found, denied=denied)

    def may_read(self, client: str, wanted: str) -> bool:
        if any(covers(each, wanted) for each in self.denied.get(client, ())):
            return False
        mine = [*self.readable.get(None, ()), *self.readable.get(client, ())]
        return any(covers(each.replace("%u", client), wanted) for each in mine)


def covers(allowed: str, wanted: str) -> bool:
    """Whether the topic filter ``allowed`` matches every topic that ``wanted`` matches."""
    theirs = wanted.split("/")
    for place, level in enumerate(ours := allowed.split("/")):
        if level == "#":
            return True
        if place >= len(theirs) or theirs[place] == "#" or level not in ("+", theirs[place]):
            return False
    return len(ours) == len(theirs)


def of_mosquitto(line: str, access: Access) -> Refusal | None:
    """The refusal in a log line of mosquitto 2.0 or 2.1; None if the line has none."""
    if found := DENIED.match(line):
        topic, mark, _ = found["topic"].rpartition("', ")  # absent if a long topic was cut off
        return Refusal(client=found["client"], reason="write-denied", detail=topic if mark else found["topic"])
    if found := SUBSCRIBED.match(line):
        denied = Refusal(client=found["client"], reason="read-denied", detail=found["filter"])
        return None if access.may_read(denied.client, denied.detail) else denied
    if found := OPENSSL.match(line):
        return Refusal(client=NO_NAME, reason=_of_handshake(found["why"]))
    return None


def of_nats(line: str, _: Access) -> Refusal | None:
    """The refusal in a log line of nats-server 2.x, its own or of the authorization service; None if there is none."""
    message = line[line.find("[", 1) :]  # after process id and time
    if found := VIOLATION.match(message):
        reason = "write-denied" if found["what"] == "Publish" else "read-denied"
        return Refusal(client=found["client"], reason=reason, detail=_topic(found["subject"]))
    if found := CALLOUT.match(message):
        if found["client"] is not None:
            return Refusal(client=found["client"], reason="wrong-client-id", detail=found["other"])
        return Refusal(client=NO_NAME, reason="not-admitted", detail=found["why"])
    if found := HANDSHAKE.match(message):
        return Refusal(client=NO_NAME, reason=_of_handshake(found["why"]), detail=found["peer"])
    return None


def _of_handshake(why: str) -> str:
    return next((reason for part, reason in HANDSHAKES.items() if part in why), "no-handshake")


def _topic(subject: str) -> str:
    """The MQTT topic or filter of a NATS subject."""
    levels = subject.replace("//", "\0").replace(".", "/").replace("\0", ".")
    return levels.replace("*", "+").replace(">", "#")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The log format of an engine.

    ``refusal`` parses a line, ``packets`` are the beginnings of lines about a packet, ``granted`` matches lines about a
    granted request.
    """

    refusal: Callable[[str, Access], Refusal | None]
    packets: tuple[bytes, ...] = ()
    granted: re.Pattern[str] | None = None
    dated: bool = True  # mosquitto takes longer to format the time than the rest of a line, so the time is added here


DIALECTS: Final[Mapping[str, Dialect]] = {
    "mosquitto": Dialect(
        refusal=of_mosquitto, packets=(b"Sending ", b"Received ", b"\t"), granted=GRANTED, dated=False
    ),
    "nats": Dialect(refusal=of_nats),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """The refusals of one client for one reason; times are in UTC, ``detail`` is that of the last refusal."""

    client: str
    reason: str
    count: int
    first: str
    last: str
    detail: str


@dataclass(slots=True)
class Counts:
    """The counts of all clients since ``since``: by name for the first `CLIENTS_MAX`, in one sum for the others."""

    since: str
    rows: dict[tuple[str, str], Count] = field(default_factory=dict)
    names: set[str] = field(default_factory=lambda: {NO_NAME, OTHERS})

    @classmethod
    def load(cls, path: Path, now: str) -> "Counts":
        """The counts that an earlier run saved; empty counts if they cannot be read."""
        counts = cls(since=now)
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            rows = [Count(**row) for row in kept["refused"]]
            counts = cls(since=str(kept["since"]), rows={(row.client, row.reason): row for row in rows})
            counts.names.update(row.client for row in rows)
        return counts

    def add(self, refusal: Refusal, now: str) -> int:
        """Count a refusal; return the number of refusals of that client for that reason."""
        known = refusal.client in self.names or len(self.names) < CLIENTS_MAX + 2
        client = refusal.client if known else OTHERS
        self.names.add(client)
        key = client, refusal.reason
        row = self.rows.get(key) or Count(client=client, reason=refusal.reason, count=0, first=now, last=now, detail="")
        self.rows[key] = replace(row, count=row.count + 1, last=now, detail=printable(refusal.detail[:DETAIL_CHARS]))
        return row.count + 1

    def dumps(self) -> str:
        rows = sorted(self.rows.values(), key=lambda row: (-row.count, row.client, row.reason))
        return json.dumps({"since": self.since, "refused": [asdict(row) for row in rows]})


def printable(text: str) -> str:
    """Text from a client with control characters replaced, safe to print on a terminal."""
    return "".join(each if each.isprintable() or each == "\t" else "?" for each in text)


@dataclass(slots=True)
class Lines:
    """Splits a stream of bytes into lines; a line longer than `LINE_BYTES` is cut off."""

    _rest: bytes = b""
    _skipping: bool = False

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if self._skipping and lines:
            del lines[0]
            self._skipping = False
        if len(self._rest) > LINE_BYTES:
            if not self._skipping:
                lines.append(self._rest)
            self._rest, self._skipping = b"", True
        return [line[:LINE_BYTES] for line in lines]


class Counter:
    """Counts the refusals in a log, and writes the lines that are useful to an operator to the log file."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.changed = True
        self._folder, self._dialect = folder, DIALECTS[engine]
        self._access, self._access_of = Access(), -1
        self._lines = Lines()
        self._log = (folder / LOG).open("ab", buffering=0)
        self._counts = Counts.load(folder / FILE, _now())

    def feed(self, chunk: bytes) -> None:
        """Process the next bytes of the log."""
        now = _now()
        self._read_access()
        kept = [text for line in self._lines.feed(chunk) if (text := self._kept(line, now))]
        if kept:
            time_of_it = "" if self._dialect.dated else f"{now}: "
            self._write("".join(f"{time_of_it}{printable(text)}\n" for text in kept).encode())

    def save(self) -> None:
        """Write the counts to the file that `ternbus broker refusals` reads."""
        partial = self._folder / f"{FILE}.partial"
        with suppress(OSError):  # a full disk must stop neither the broker nor the count
            partial.write_text(self._counts.dumps(), encoding="utf-8")
            partial.replace(self._folder / FILE)
            self.changed = False

    def close(self) -> None:
        """Process the rest of a log that has ended, perhaps in the middle of a line, and save the counts."""
        self.feed(b"\n")
        self.save()
        self._log.close()

    def _kept(self, line: bytes, now: str) -> str:
        """The line for the log file, or empty. Of each client and reason only refusals 1, 10, 100, … are kept."""
        if line.startswith(self._dialect.packets):
            return ""
        text, granted = line.decode("utf-8", "replace"), self._dialect.granted
        if (refusal := self._dialect.refusal(text, self._access)) is None:
            return "" if granted is not None and granted.match(text) else text
        self.changed = True
        return text if str(self._counts.add(refusal, now)).strip("0") == "1" else ""

    def _write(self, lines: bytes) -> None:
        with suppress(OSError):
            if self._log.tell() > LOG_BYTES:
                self._log.close()
                (self._folder / LOG).replace(self._folder / f"{LOG}.1")
                self._log = (self._folder / LOG).open("ab", buffering=0)
            self._log.write(lines)

    def _read_access(self) -> None:
        """Load the access list if it has changed. nats-server has none: its log names each refusal."""
        path = self._folder / ACCESS
        with suppress(OSError, ValueError):
            if (written := path.stat().st_mtime_ns) != self._access_of:
                self._access, self._access_of = Access.parse(path.read_text(encoding="utf-8")), written


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _enlarged(pipe: int) -> bool:
    """Whether the pipe now holds `READ_BYTES`, enough for the output between two reads."""
    with suppress(AttributeError, OSError):  # not Linux, or too many pipes
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, READ_BYTES) >= READ_BYTES
    return False


def main(folder: str, engine: str) -> None:
    """Count the refusals in the log on standard input until it ends. Signals are ignored: they are for the broker."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nap_s = NAP_S if _enlarged(0) else 0.0
    counter = Counter(Path(folder), engine)
    counter.save()
    saved_at = time.monotonic()
    while True:
        wait_s = max(0.0, saved_at + SAVE_EVERY_S - time.monotonic()) if counter.changed else None
        if select.select([0], [], [], wait_s)[0]:
            if not (chunk := os.read(0, READ_BYTES)):
                break
            counter.feed(chunk)
            time.sleep(nap_s)
        if counter.changed and time.monotonic() >= saved_at + SAVE_EVERY_S:
            counter.save()
            saved_at = time.monotonic()
    counter.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
