"""The process of the dashboard beside a running aggregator: its address, its start, its end.

The aggregator opens the socket, so that a wrong address is a mistake at the start, and knows nothing else of it.
"""

import errno
import importlib.util
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.aggregator.shell import dashboard_token
from ternbus.broker.errors import ConfigError
from ternbus.broker.log_levels import ERROR, WARNING
from ternbus.broker.log_output import WriteLog
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.endpoint import WILDCARDS, is_loopback

MODULE: Final = "ternbus.aggregator.dashboard"
LIBRARIES: Final = ("starlette", "uvicorn", "prometheus_client")
LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")
NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?|[0-9a-f:]+")
BACKLOG: Final = 128
FREE_WITHIN_S: Final = 3.0  # the dashboard of an aggregator that was killed just now has its address for a moment
LOOK_S: Final = 0.05
END_WITHIN_S: Final = 5.0
RESTART_S: Final = (1.0, 60.0)  # before another start: twice as long each time
WELL_S: Final = 60.0  # after running for so long the first is right again

Address = Annotated[
    str | None,
    typer.Option(
        "--dashboard",
        metavar="ADDRESS:PORT",
        help="Show the federation to a browser at http://ADDRESS:PORT, such as 127.0.0.1:8080; port 0 takes a free "
        "one. Needs the extra `dashboard`.",
    ),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--dashboard-host",
        metavar="NAME",
        help="Name by which browsers reach the dashboard, such as that of a proxy; reading then needs the token too; "
        "repeatable.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """An address that listens already.

    ``is_private``: other machines reach it, be it by a proxy; ``is_open``: they reach it directly.
    """

    socket: socket.socket
    url: str
    hosts: tuple[str, ...]
    is_private: bool
    is_open: bool


def is_installed() -> bool:
    """Whether the extra `dashboard` is."""
    return all(importlib.util.find_spec(each) is not None for each in LIBRARIES)


def listen(address: str | None, names: Sequence[str] = ()) -> Listener | None:
    """Take the address; None without one. ConfigError where it is none or is not to be had, or the extra is missing."""
    if address is None:
        if names:
            raise ConfigError("--dashboard-host is for --dashboard: add --dashboard ADDRESS:PORT")
        return None
    if not is_installed():
        raise ConfigError("--dashboard needs starlette and uvicorn; run: pip install 'ternbus[dashboard]'")
    host, port = _parse(address)
    named = [name.lower().rstrip(".").strip("[]") for name in names]
    for name, given in zip(named, names, strict=True):
        if not NAME.fullmatch(name):
            raise ConfigError(f"invalid --dashboard-host {given}: write a host's name without port, such as fl.example")
    opened = _open(host, port, address)
    actual = opened.getsockname()[1]
    shown = WILDCARDS.get(host, host)
    return Listener(
        socket=opened,
        url=f"http://{f'[{shown}]' if ':' in shown else shown}:{actual}/",
        hosts=(*LOOPBACK_NAMES, host.lower(), *named),
        is_private=not is_loopback(host) or any(not is_loopback(name) for name in named),
        is_open=not is_loopback(host),
    )


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"invalid --dashboard {address}: write ADDRESS:PORT, for example 127.0.0.1:8080")
    return host, int(port)


def _open(host: str, port: int, address: str) -> socket.socket:
    what = f"cannot show the dashboard at {address}: "
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{what}{host} is no address of this machine ({error})") from error
    deadline = time.monotonic() + FREE_WITHIN_S
    while True:
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(place)
            opened.listen(BACKLOG)
        except OSError as error:
            opened.close()
            if error.errno == errno.EADDRINUSE:
                if time.monotonic() < deadline:
                    time.sleep(LOOK_S)  # no event says that a port is free
                    continue
                raise ConfigError(f"{what}another process has this port; choose another one, or 0 for any") from error
            if error.errno == errno.EACCES:
                raise ConfigError(f"{what}only root may take port {port}; choose one above 1023") from error
            raise ConfigError(f"{what}{error.strerror}; give an address of this machine") from error
        else:
            return opened


@contextmanager
def beside(listener: Listener | None, directory: Path, say: WriteLog, *, as_json: bool) -> Iterator[None]:
    """Run the dashboard while the block runs. Its failures are logged, and never the block's."""
    if listener is None:
        yield
        return
    dashboard_token.ensure(directory)
    process = _Process(listener, directory, say, as_json=as_json)
    process.start()
    command, aim = f"ternbus aggregator dashboard-token {quoted(directory)}", "read" if listener.is_private else "act"
    say(
        f"dashboard at {listener.url}; to {aim}, log in by the token of: {command}",
        event="dashboard",
        fields={"url": listener.url},
    )
    if listener.is_open:
        say(
            "the dashboard is open to the network, without TLS: put a proxy with TLS before it, or reach it by ssh -L",
            level=WARNING,
            event="dashboard-open",
        )
    try:
        yield
    finally:
        process.stop()


class _Process:
    """The child, and a thread that starts it again. Its standard input ends with this process, also by SIGKILL."""

    def __init__(self, listener: Listener, directory: Path, say: WriteLog, *, as_json: bool) -> None:
        self._listener, self._say = listener, say
        hosts = [part for name in listener.hosts for part in ("--host", name)]
        self._command = [
            sys.executable, "-P", "-m", MODULE, str(directory), "--descriptor", str(listener.socket.fileno()), *hosts,
            *(["--private"] if listener.is_private else []), *(["--json"] if as_json else []),
        ]  # fmt: skip
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="dashboard", daemon=True)
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._lock:  # no child is started after this
            self._stopping.set()
            child = self._child
        if child is not None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(END_WITHIN_S)
            child.kill()
        self._thread.join(END_WITHIN_S)
        self._listener.socket.close()

    def _supervise(self) -> None:
        shortest_s, longest_s = RESTART_S
        wait_s = shortest_s
        while True:
            began = time.monotonic()
            what = self._run()
            if time.monotonic() - began > WELL_S:
                wait_s = shortest_s
            if self._stopping.wait(wait_s):  # the whole group may have been told to end, this process a moment later
                return
            self._say(f"the dashboard {what}; it is started again", level=ERROR, event="dashboard-ended")
            wait_s = min(2 * wait_s, longest_s)

    def _run(self) -> str:
        """Run the child until it ends; how it did."""
        with self._lock:
            if self._stopping.is_set():
                return "was not started"
            try:
                self._child = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[self._listener.socket.fileno()],
                )
            except OSError as error:
                return f"cannot be started: {error.strerror}"
        code = self._child.wait()
        assert self._child.stdin is not None  # noqa: S101 - it is a pipe
        self._child.stdin.close()
        return f"ended with code {code}"
