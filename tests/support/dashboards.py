"""A dashboard's process over a directory, and what a browser or an attacker sends to it."""

import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ternbus.aggregator.shell import dashboard_process, dashboard_token
from ternbus.broker.log_levels import INFO

WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the dashboard answered."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Log:
    """The lines that the aggregator's side writes."""

    lines: list[str] = field(default_factory=list)

    def __call__(
        self, text: str, /, *, level: str = INFO, event: str = "note", fields: Mapping[str, object] | None = None
    ) -> None:
        del level, event, fields
        self.lines.append(text)


@dataclass(slots=True)
class Site:
    """A running dashboard; requests are as its own page sends them, unless a test says otherwise."""

    directory: Path
    host: str
    port: int
    cookie: str = ""
    csrf: str = ""

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=WITHIN_S)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str | None] | None = None
    ) -> Answer:
        """One request; a header that is None is not sent."""
        sent: dict[str, str | None] = {"Host": self.authority}
        if method == "POST":
            sent |= {"Origin": f"http://{self.authority}", "Content-Type": "application/json"}
            sent |= {"X-CSRF-Token": self.csrf} if self.csrf else {}
            body = b"{}" if body is None else body
            sent["Content-Length"] = str(len(body))
        sent |= {"Cookie": self.cookie} if self.cookie else {}
        sent |= headers or {}
        connection = self.connection()
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            known = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, known, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str | None) -> Answer:
        return self.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, content: object = None, **headers: str | None) -> Answer:
        body = json.dumps({} if content is None else content).encode()
        return self.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def log_in(self) -> None:
        answer = self.post("/login", {"token": dashboard_token.read(self.directory)})
        assert answer.status == 200, answer.body
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        self.csrf = answer.json["csrf"]

    @contextmanager
    def events(self, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """The stream of a page that is open."""
        connection = self.connection()
        connection.request("GET", "/events", headers={"Cookie": self.cookie, **headers} if self.cookie else headers)
        answer = connection.getresponse()
        try:
            yield answer
        finally:
            answer.close()
            connection.close()


def next_state(stream: http.client.HTTPResponse) -> dict[str, Any]:
    """The next state of a stream."""
    while line := stream.readline():
        if line.startswith(b"data: "):
            found: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            return found
    raise AssertionError("the stream has ended")


@contextmanager
def serving(directory: Path, address: str = "127.0.0.1:0", *names: str, log: Log | None = None) -> Iterator[Site]:
    """The dashboard of a directory, as the aggregator's process starts it."""
    listener = dashboard_process.listen(address, names)
    assert listener is not None
    place = urlsplit(listener.url)
    assert place.hostname is not None
    assert place.port is not None
    with dashboard_process.beside(listener, directory, log or Log(), as_json=False):
        yield Site(directory, place.hostname, place.port)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def dashboards(pid: int) -> list[int]:
    """Those of its children that are dashboards."""
    return [child for child in children(pid) if dashboard_process.MODULE.encode() in _command(child)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def await_end(pid: int) -> None:
    """Wait until a process that is not our child is gone."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")
