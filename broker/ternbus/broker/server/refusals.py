"""What a broker refused, counted by client and reason, read off its log; usable as a script: nothing but stdlib.

The log goes through a process of its own, which ends when the log does. So the broker never waits for whoever started
it, and can write its last words when that one is gone. mosquitto names what it denies only where it logs each packet
(``log_type debug``), and grants a subscription to what it will not deliver: the one is kept out of the file, the other
is held against the access list. Lines hold what clients chose, topics above all: everything here is bounded.
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
CLIENTS_MAX: Final = 200  # kept by name
LINE_BYTES: Final = 2048
DETAIL_CHARS: Final = 120
LOG_BYTES: Final = 4 << 20  # then begun anew, the one before being kept
READ_BYTES: Final = 1 << 20
NAP_S: Final = 0.02  # to read much at once: to be woken for each line costs the broker as much as to write it
SAVE_EVERY_S: Final = 0.5

STRANGER: Final = "?"  # proved no name
OTHERS: Final = "*"  # those beyond CLIENTS_MAX, together
REASONS: Final[Mapping[str, str]] = {
    "no-certificate": "showed no certificate",
    "bad-certificate": "showed a certificate that is not of this broker's authority, or has ended",
    "old-tls": "speaks TLS 1.2 or older",
    "no-handshake": "broke TLS off: speaks something else, or does not believe this broker",
    "wrong-client-id": "took another's name for its client id",
    "not-admitted": "has a certificate for nothing here, or came by another way than MQTT",
    "write-denied": "wrote to a topic that is not its own",
    "read-denied": "asked to read topics that are not its own",
}
# What OpenSSL (mosquitto) and Go (nats-server) say of a handshake.
HANDSHAKES: Final[Mapping[str, str]] = {
    "did not return a certificate": "no-certificate",
    "didn't provide a certificate": "no-certificate",
    "certificate verify failed": "bad-certificate",
    "failed to verify certificate": "bad-certificate",
    "unsupported protocol": "old-tls",
    "only unsupported versions": "old-tls",
}
NAME: Final = r"(?P<client>[a-z0-9][a-z0-9_-]{0,63})"  # as certificates hold it
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
    """One thing that the broker refused; ``detail`` is what was asked for, or where the stranger came from."""

    client: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What each name may read, by mosquitto's access list; the name None is everybody's."""

    readable: Mapping[str | None, list[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Access":
        found: dict[str | None, list[str]] = {}
        user: str | None = None
        for line in text.splitlines():
            match line.split():
                case ["user", name]:
                    user = name
                case ["topic" | "pattern" as kind, "read" | "readwrite", topics]:
                    found.setdefault(user if kind == "topic" else None, []).append(topics)
                case _:  # what may be written, comments
                    continue
        return cls(readable=found)

    def may_read(self, client: str, wanted: str) -> bool:
        mine = [*self.readable.get(None, ()), *self.readable.get(client, ())]
        return any(covers(each.replace("%u", client), wanted) for each in mine)


def covers(allowed: str, wanted: str) -> bool:
    """Whether a topic filter takes in nothing but what another one does."""
    theirs = wanted.split("/")
    for place, level in enumerate(ours := allowed.split("/")):
        if level == "#":
            return True
        if place >= len(theirs) or theirs[place] == "#" or level not in ("+", theirs[place]):
            return False
    return len(ours) == len(theirs)


def of_mosquitto(line: str, access: Access) -> Refusal | None:
    """What a line of mosquitto 2.0 or 2.1 says that it refused."""
    if found := DENIED.match(line):
        topic, mark, _ = found["topic"].rpartition("', ")  # which is not there where the topic is very long
        return Refusal(client=found["client"], reason="write-denied", detail=topic if mark else found["topic"])
    if found := SUBSCRIBED.match(line):
        denied = Refusal(client=found["client"], reason="read-denied", detail=found["filter"])
        return None if access.may_read(denied.client, denied.detail) else denied
    if found := OPENSSL.match(line):
        return Refusal(client=STRANGER, reason=_of_handshake(found["why"]))
    return None


def of_nats(line: str, _: Access) -> Refusal | None:
    """What a line of nats-server 2.x says that it, or our doorkeeper, refused."""
    said = line[line.find("[", 1) :]  # after process id and time
    if found := VIOLATION.match(said):
        reason = "write-denied" if found["what"] == "Publish" else "read-denied"
        return Refusal(client=found["client"], reason=reason, detail=_topic(found["subject"]))
    if found := CALLOUT.match(said):
        if found["client"] is not None:
            return Refusal(client=found["client"], reason="wrong-client-id", detail=found["other"])
        return Refusal(client=STRANGER, reason="not-admitted", detail=found["why"])
    if found := HANDSHAKE.match(said):
        return Refusal(client=STRANGER, reason=_of_handshake(found["why"]), detail=found["peer"])
    return None


def _of_handshake(why: str) -> str:
    return next((reason for said, reason in HANDSHAKES.items() if said in why), "no-handshake")


def _topic(subject: str) -> str:
    """The MQTT topic or filter that nats-server made a subject of."""
    levels = subject.replace("//", "\0").replace(".", "/").replace("\0", ".")
    return levels.replace("*", "+").replace(">", "#")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How an engine's log is read: what it refused, and what is said of each packet or of what was granted."""

    refusal: Callable[[str, Access], Refusal | None]
    packets: tuple[bytes, ...] = ()
    granted: re.Pattern[str] | None = None
    dated: bool = True  # mosquitto spends more on the time of a line than on the rest of it, so that is left to us


DIALECTS: Final[Mapping[str, Dialect]] = {
    "mosquitto": Dialect(
        refusal=of_mosquitto, packets=(b"Sending ", b"Received ", b"\t"), granted=GRANTED, dated=False
    ),
    "nats": Dialect(refusal=of_nats),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How often one client was refused for one reason; times in UTC, ``detail`` of the last."""

    client: str
    reason: str
    count: int
    first: str
    last: str
    detail: str


@dataclass(slots=True)
class Tally:
    """The counts of all clients since ``since``: by name for the first `CLIENTS_MAX`, of the rest together."""

    since: str
    rows: dict[tuple[str, str], Count] = field(default_factory=dict)
    names: set[str] = field(default_factory=lambda: {STRANGER, OTHERS})

    @classmethod
    def load(cls, path: Path, now: str) -> "Tally":
        """As an earlier run left it; where that cannot be read, from nothing."""
        tally = cls(since=now)
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            rows = [Count(**row) for row in kept["refused"]]
            tally = cls(since=str(kept["since"]), rows={(row.client, row.reason): row for row in rows})
            tally.names.update(row.client for row in rows)
        return tally

    def add(self, refusal: Refusal, now: str) -> int:
        """Count it, and say how often that client was refused for that reason."""
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
    """What may hold a client's own words, harmless on a terminal."""
    return "".join(each if each.isprintable() or each == "\t" else "?" for each in text)


@dataclass(slots=True)
class Lines:
    """Bytes as they come, cut into lines; of a line that is too long the beginning only."""

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
    """Counts what passes, and keeps what a person may want to read of it in the log."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.changed = True
        self._folder, self._dialect = folder, DIALECTS[engine]
        self._access, self._access_of = Access(), -1
        self._lines = Lines()
        self._log = (folder / LOG).open("ab", buffering=0)
        self._tally = Tally.load(folder / FILE, _now())

    def feed(self, chunk: bytes) -> None:
        """Take what the broker has written since."""
        now = _now()
        self._read_access()
        kept = [text for line in self._lines.feed(chunk) if (text := self._kept(line, now))]
        if kept:
            time_of_it = "" if self._dialect.dated else f"{now}: "
            self._write("".join(f"{time_of_it}{printable(text)}\n" for text in kept).encode())

    def save(self) -> None:
        """Show the counts to `ternbus broker refusals`."""
        partial = self._folder / f"{FILE}.partial"
        with suppress(OSError):  # a full disk: the broker goes on, and so does counting
            partial.write_text(self._tally.dumps(), encoding="utf-8")
            partial.replace(self._folder / FILE)
            self.changed = False

    def close(self) -> None:
        """The log has ended, perhaps in the middle of a line."""
        self.feed(b"\n")
        self.save()
        self._log.close()

    def _kept(self, line: bytes, now: str) -> str:
        """The line, or nothing; of each client and reason the first, tenth, hundredth …, or a flood would fill it."""
        if line.startswith(self._dialect.packets):
            return ""
        text, granted = line.decode("utf-8", "replace"), self._dialect.granted
        if (refusal := self._dialect.refusal(text, self._access)) is None:
            return "" if granted is not None and granted.match(text) else text
        self.changed = True
        return text if str(self._tally.add(refusal, now)).strip("0") == "1" else ""

    def _write(self, lines: bytes) -> None:
        with suppress(OSError):
            if self._log.tell() > LOG_BYTES:
                self._log.close()
                (self._folder / LOG).replace(self._folder / f"{LOG}.1")
                self._log = (self._folder / LOG).open("ab", buffering=0)
            self._log.write(lines)

    def _read_access(self) -> None:
        """Again, if it has changed: there may be a newcomer. nats-server, which names what it refuses, has none."""
        path = self._folder / ACCESS
        with suppress(OSError, ValueError):
            if (written := path.stat().st_mtime_ns) != self._access_of:
                self._access, self._access_of = Access.parse(path.read_text(encoding="utf-8")), written


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _enlarged(pipe: int) -> bool:
    """Whether there is room in it for what comes while we rest."""
    with suppress(AttributeError, OSError):  # not Linux, or too many pipes
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, READ_BYTES) >= READ_BYTES
    return False


def main(folder: str, engine: str) -> None:
    """Count what comes on standard input, until it ends: with the broker, not by a signal that is for the broker."""
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
